"""Tiny real models made by code, so that unit tests load no weights from anywhere."""

from studies.models import CHATML, make_tiny_llama, make_tokenizer, tiny_llama_config

__all__ = ["CHATML", "make_tiny_llama", "make_tokenizer", "tiny_llama_config"]
