"""The checker of annotations that conftest.py installs: beartype, with ints allowed where floats are annotated."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
