"""The oracle on MoE blocks of other libraries: environments, cases, verdicts, the scoreboard."""
