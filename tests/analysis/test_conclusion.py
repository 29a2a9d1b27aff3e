"""The summary sentences at the start of an analysis page."""

from moe.analysis.conclusion import conclude, few_values


def label(explained, p=0.01, values=40):
    return [{"explained": share, "p_value": p, "values": values} for share in explained]


def summary_of(token, untrained, domain, lexical, observed, exchanged):
    rows = [{"observed": observed, "token_mean": exchanged, "token_p_value": 0.01}]
    return {
        "dependence": {
            "token": label(token),
            "domain_matched": label(domain, values=3),
            "lexical_matched": label(lexical, values=3),
        },
        "controls": {"untrained": {"dependence": {"token": label(untrained)}}},
        "repetition": {"first": {"a": rows}},
    }


def test_sentences_name_the_stronger_label_and_its_null():
    token, matched, repeated = conclude(summary_of((0.5, 0.3), (0.2, 0.2), (0.02,), (0.12,), 0.35, 0.25))
    assert "which token it is: this explains 40% of the expert's entropy" in token  # (50 + 30) / 2
    assert "p ≤ 0.010 in every layer), more than with untrained routers (20%)" in token
    assert "with 3 values each" in matched
    assert matched.endswith("it follows the class of the token's text (word, number, bracket, ...) more.")
    assert "in 35% of cases, and in 25% once" in repeated
    assert repeated.endswith("context accounts for the rest.")


def test_sentences_say_when_nothing_was_learnt():
    token, matched, repeated = conclude(summary_of((0.2,), (0.21,), (0.11,), (0.1,), 0.3, 0.31))
    assert "about as much as with untrained routers (21%), so that training did not add it" in token
    assert "follows neither more than the other" in matched
    assert "context for next to nothing" in repeated


def test_labels_with_few_values_are_named():
    assert "Labels of few values: domain matched 3, lexical matched 3." in few_values(
        summary_of((0.2,), (0.2,), (0.1,), (0.1,), 0.3, 0.3)
    )
    assert few_values({"dependence": {"token": label((0.2,))}}) == ""
