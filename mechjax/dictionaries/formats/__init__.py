"""Dictionaries from files of other libraries, and back."""

from mechjax.dictionaries.formats.load import FORMATS as FORMATS
from mechjax.dictionaries.formats.load import load as load
from mechjax.dictionaries.formats.write_saelens import write_saelens as write_saelens
