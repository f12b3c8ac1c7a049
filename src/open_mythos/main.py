"""The import path of the published tutorial; it only re-exports."""

from open_mythos.config import MythosConfig
from open_mythos.model.attention import GQAttention
from open_mythos.model.experts import MoEFFN
from open_mythos.model.halting import ACTHalting
from open_mythos.model.injection import LTIInjection
from open_mythos.model.latent_attention import MLAttention
from open_mythos.model.mythos import OpenMythos

__all__ = ["ACTHalting", "GQAttention", "LTIInjection", "MLAttention", "MoEFFN", "MythosConfig", "OpenMythos"]
