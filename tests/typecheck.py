"""The checker of types and shapes at run time, for `--jaxtyping-packages=medgen,typecheck.checker`."""

from beartype import BeartypeConf, beartype

# An int is a float to Python's own typing rules (PEP 484), so also here.
checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
