"""Families of Hugging Face architectures, as tables."""

from mechjax.models.families.family import Family as Family
from mechjax.models.families.known import EVERY as EVERY
from mechjax.models.families.known import FAMILIES as FAMILIES
from mechjax.models.families.known import OTHERS as OTHERS
from mechjax.models.families.known import config_from_hf as config_from_hf
from mechjax.models.families.known import config_to_hf as config_to_hf
from mechjax.models.families.native import NATIVE as NATIVE
from mechjax.models.families.rule import Rule as Rule
