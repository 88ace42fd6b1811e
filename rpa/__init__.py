"""Ragged paged attention for TPUs, GPUs and CPUs: one contract, several kernels, every one judged."""

from rpa.api import ragged_page_attention_v2 as ragged_page_attention_v2
from rpa.cache import ConfigCache as ConfigCache
from rpa.cache import PersistentCache as PersistentCache
from rpa.cache import overlay_cache as overlay_cache
from rpa.chain import AutotunePolicy as AutotunePolicy
from rpa.chain import ConfigSelectorChain as ConfigSelectorChain
from rpa.chain import policy_override as policy_override
from rpa.config import Backend as Backend
from rpa.config import Platform as Platform
from rpa.config import RaggedPageAttentionv2Config as RaggedPageAttentionv2Config
from rpa.explanation import Explanation as Explanation
from rpa.explanation import explain as explain
from rpa.kernel import Executor as Executor
from rpa.kernel import Invocation as Invocation
from rpa.kernel import Kernel as Kernel
from rpa.operation import RaggedPageAttentionv2 as RaggedPageAttentionv2
from rpa.registry import KernelSpec as KernelSpec
from rpa.registry import detect_platform as detect_platform
from rpa.registry import kernel_registry as kernel_registry
from rpa.tune import Tuner as Tuner
