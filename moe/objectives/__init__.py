"""Training objectives, one class in one file each; :data:`moe.config.objectives.OBJECTIVES` names them."""
