"""Model families by name.

To add a family, write its file in this package and name it in ``FAMILIES`` and ``ModelConfig``.
"""

from rudolph.families.clip import CLIPFamily, CLIPModelConfig
from rudolph.families.flamingo import FlamingoFamily, FlamingoSection
from rudolph.families.interface import Family, ModelSection
from rudolph.families.language_model import LanguageModelFamily, LanguageModelSection
from rudolph.families.late_fusion import LateFusionFamily, LateFusionSection
from rudolph.families.llava import LLaVAFamily, LLaVASection
from rudolph.families.rudolph import RudolphConfig, RudolphFamily
from rudolph.families.vqgan import VQGANFamily, VQGANOnlyConfig

# Type of an experiment's ``model`` section: a union tagged by ``family``.
ModelConfig = (
    RudolphConfig
    | CLIPModelConfig
    | VQGANOnlyConfig
    | LanguageModelSection
    | FlamingoSection
    | LLaVASection
    | LateFusionSection
)

FAMILIES: dict[str, Family] = {
    "rudolph": RudolphFamily(),
    "clip": CLIPFamily(),
    "vqgan": VQGANFamily(),
    "language_model": LanguageModelFamily(),
    "flamingo": FlamingoFamily(),
    "llava": LLaVAFamily(),
    "late_fusion": LateFusionFamily(),
}


def family_of(section: ModelSection) -> Family:
    """Return the family of a ``model`` section."""
    return FAMILIES[section.family]
