"""Ragged paged attention for TPUs, GPUs and CPUs: one contract, several kernels, every one judged."""

from rpa.api import ragged_page_attention_v2 as ragged_page_attention_v2
from rpa.config import RaggedPageAttentionv2Config as RaggedPageAttentionv2Config
