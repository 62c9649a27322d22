"""The forms that out-of-memory messages have, a row each: torch, serving engines, the driver, and the host.

A form is written as the message is, with fields in angle brackets: `Tried to allocate <request>`. `<*>` is any text on
one line. A field's kind (`FIELDS`) decides what is read there, always with its unit: a number that is cut off is not
read. Where a message continues, `details` are further parts of it, each of which may be missing.
"""

from __future__ import annotations

import re
from functools import cache

from memplan.core.records import NamedTuple

GPU, DRIVER, BUDGET, HOST, KILLED, OTHER = "GPU", "driver", "engine's budget", "host", "killed", "other library"

# Field -> kind.
FIELDS = {
    **dict.fromkeys(
        ("request", "total", "free", "allocated", "reserved", "unallocated", "pools", "in_use", "other", "allowed"),
        "bytes",
    ),
    **dict.fromkeys(("desired", "needed", "available", "weights", "activations", "non_torch", "kv", "peak"), "bytes"),
    **dict.fromkeys(("device", "pid", "status", "killed_pid"), "number"),
    **dict.fromkeys(("max_len", "possible_len", "tokens", "requested_tokens", "free_tokens"), "tokens"),
    **dict.fromkeys(("utilization", "static_fraction"), "share"),
    "shape": "shape",
    "request_bytes": "plain bytes",
    "deficit": "negative bytes",
    **{f"{name}_told": "told bytes" for name in ("total", "free", "allocated", "in_use", "unallocated")},
}
_UNIT = r"(?:bytes|[kKMGT]i?B|B)"
_KINDS = {
    # the unit of the first of a pair, as in `7.34/15.49 GiB`, is that of the second
    "bytes": rf"(?<![\w.,-])-?\d{{1,20}}(?:\.\d{{1,6}})?(?:\s?{_UNIT}\b|(?=/\d{{1,20}}(?:\.\d{{1,6}})?\s?{_UNIT}\b))",
    "plain bytes": r"(?<![\w.,-])\d{1,18}(?![\w,]|\.\d)(?!\Z)",
    "negative bytes": rf"-\d{{1,20}}(?:\.\d{{1,6}})?\s?{_UNIT}\b",
    # people leave out a unit that an earlier number has
    "told bytes": rf"(?<![\w.,-])\d{{1,20}}(?:\.\d{{1,6}})?(?:\s?{_UNIT}\b|(?=[\s,;.)])(?!\.\d)(?!\s?\w?i?B\b))",
    "number": r"(?<![\w.,-])\d{1,10}(?![\w,]|\.\d)(?!\Z)",
    "tokens": r"(?<![\w.,-])\d{1,3}(?:,\d{3}){1,4}(?!\w|,\d|\.\d)(?!\Z)|(?<![\w.,-])\d{1,12}(?![\w]|,\d|\.\d)(?!\Z)",
    "share": r"(?<![\w.,-])[01](?:\.\d{1,17})?(?![\w]|\.\d)(?!\Z)",
    "shape": r"\[\d{1,10}(?:, ?\d{1,10}){0,6}\]",
}


class Form(NamedTuple):
    """A message.

    library  who writes it
    cause    GPU (a tensor did not fit), driver (memory outside the library's pool), engine's budget, host, killed
             (by the operating system), or other library (one that memplan does not explain)
    start    the part that it is found by
    details  parts that may follow
    source   package, version and file
    is_told  in people's words, who quote a part of it: numbers may precede it on its line
    """

    library: str
    cause: str
    start: str
    details: tuple[str, ...] = ()
    source: str = ""
    is_told: bool = False


_TORCH = "torch 2.13 c10/cuda/CUDACachingAllocator.cpp malloc"
_SINCE_2_1 = (
    "GPU <device> has a total capacity of <total> of which <free> is free",
    "GPU <device> has a total capacty of <total> of which <free> is free",
    "this process has <in_use> memory in use",
    "Process <pid> has <other> memory in use",
    "<allowed> allowed;",
    "Of the allocated memory <allocated> is allocated by PyTorch",
    "with <pools> allocated in private pools",
    "and <unallocated> is reserved by PyTorch but unallocated",
)
_BEFORE_2_1 = (
    "(GPU <device>; <total> total capacity",
    "(NPU <device>; <total> total capacity",
    "<allocated> already allocated",
    "<free> free;",
    "<allowed> allowed;",
    "<reserved> reserved in total by PyTorch)",
    "<unallocated> cached)",
)
_TOLD = (
    "<total_told> of which <free_told> is free",
    "<allocated_told> is allocated by PyTorch",
    "<allocated_told> allocated by PyTorch",
    "<allocated_told> already allocated of <total_told>",
    "<allocated_told> allocated of <total_told>",
    "<unallocated_told> is reserved by PyTorch but unallocated",
    "<unallocated_told> reserved",
    "<total_told> total",
    "total <total_told>",
    "<free_told> free",
    "<in_use_told> in use",
)


def _torch(device: str) -> Form:
    start = f"{device} out of memory. Tried to allocate <request>"
    return Form("torch", GPU, start, (*_SINCE_2_1, *_BEFORE_2_1), _TORCH)


FORMS: tuple[Form, ...] = (
    *map(_torch, ("CUDA", "HIP", "XPU", "NPU", "MUSA")),
    Form(
        "torch",
        GPU,
        "MPS backend out of memory",
        (
            "(MPS allocated: <allocated>",
            "other allocations: <other>",
            "max allowed: <allowed>)",
            "Tried to allocate <request> on",
        ),
        "torch 2.13 aten/src/ATen/mps/MPSAllocator.mm",
    ),
    Form(
        "torch",
        HOST,
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate <request>",
        (),
        "torch 2.13 c10/core/impl/alloc_cpu.cpp",
    ),
    Form("torch", HOST, "DefaultCPUAllocator: not enough memory: you tried to allocate <request>"),
    # serving engines
    Form(
        "vLLM",
        BUDGET,
        "(<free>/<total>) on startup is less than desired GPU memory utilization",
        ("(<utilization>, <desired>)",),
        "vllm 0.11 vllm/v1/worker/gpu_worker.py init_device",
    ),
    Form(
        "vLLM",
        BUDGET,
        "<needed> KV cache is needed",
        (
            "larger than the available KV cache memory (<available>)",
            "larger than the available (<available>)",
            "the estimated maximum model length is <possible_len>",
        ),
        "vllm 0.11 vllm/v1/core/kv_cache_utils.py check_enough_kv_cache_memory",
    ),
    Form(
        "vLLM",
        BUDGET,
        "max seq len (<max_len>) is larger than the maximum number of tokens that can be stored in KV cache (<tokens>)",
        (),
        "vllm 0.6 vllm/worker/worker.py raise_if_cache_size_invalid",
    ),
    Form(
        "vLLM",
        BUDGET,
        "larger than the maximum number of tokens (<tokens>)",
        (),
        "vllm 0.6 vllm/worker/worker.py raise_if_cache_size_invalid, as people quote it",
        is_told=True,
    ),
    Form("vLLM", BUDGET, "reserved for KV Cache is <deficit>", (), "vllm 0.7 vllm/worker/worker.py"),
    Form("vLLM", BUDGET, "No available memory for the cache blocks", (), "vllm 0.11 vllm/v1/core/kv_cache_utils.py"),
    Form(
        "vLLM",
        GPU,
        "CUDA out of memory occurred when warming up sampler with <tokens> dummy requests",
        (),
        "vllm 0.11 vllm/v1/worker/gpu_model_runner.py",
    ),
    Form(
        "SGLang",
        BUDGET,
        "Not enough memory. Please try to increase --mem-fraction-static",
        ("mem_fraction_static=<static_fraction>",),
        "sglang 0.5 python/sglang/srt/model_executor/model_runner.py init_memory_pool",
    ),
    Form(
        "SGLang",
        BUDGET,
        "of memory. Try to lower your batch size",
        (
            "Try to allocate <requested_tokens> tokens",
            "Available tokens: <free_tokens>",
            "Avaliable tokens: <free_tokens>",
        ),
        "sglang 0.5 python/sglang/srt/mem_cache/common.py alloc_token_slots",
    ),
    Form(
        "SGLang",
        BUDGET,
        "The memory capacity is unbalanced. Some GPUs may be occupied by other processes",
        (),
        "sglang 0.5 python/sglang/srt/model_executor/model_runner.py init_torch_distributed",
    ),
    Form(
        "llama.cpp",
        GPU,
        "allocating <request> on device <device>: cudaMalloc failed: out of memory",
        (),
        "llama.cpp b9000 ggml/src/ggml-cuda/ggml-cuda.cu ggml_backend_cuda_buffer_type_alloc_buffer",
    ),
    Form(
        "llama.cpp",
        GPU,
        "failed to allocate <*> buffer of size <request_bytes>",
        (),
        "llama.cpp b9000 ggml/src/ggml-alloc.c ggml_gallocr_reserve_n",
    ),
    Form("llama.cpp", GPU, "failed to allocate compute pp buffers", (), "llama.cpp b9000 src/llama-context.cpp"),
    Form("llama.cpp", GPU, "unable to allocate <*> buffer", (), "llama.cpp b9000 src/llama-model.cpp"),
    Form(
        "llama.cpp",
        HOST,
        "insufficient memory (attempted to allocate <request>)",
        (),
        "llama.cpp b9000 ggml/src/ggml.c",
    ),
    Form("llama.cpp", GPU, "Device memory allocation of size <request_bytes> failed", (), "ggml/src/ggml-vulkan"),
    Form("llama.cpp", GPU, "failed to allocate buffer, size = <request>", (), "llama.cpp b9000 ggml/src/ggml-metal"),
    Form("torch", GPU, "CUDA out of memory", (), "the first words of torch's message, where the rest is cut off"),
    *(
        Form("torch", GPU, start, _TOLD, "torch's message as people quote it", is_told=True)
        for start in (
            "Tried to allocate <request>",
            "tried <request>",
            "<allocated> allocated of <total_told>",
            "<allocated> allocated, <unallocated> reserved unallocated",
        )
    ),
    Form("torch", GPU, "torch.cuda.OutOfMemoryError<line end>", (), "torch 2.13 torch/__init__.py"),
    Form("torch", GPU, "torch.OutOfMemoryError<line end>", (), "torch 2.13 torch/__init__.py"),
    # the driver and its libraries
    *(
        Form("CUDA", DRIVER, start, (), source)
        for start, source in (
            ("CUDA error: out of memory", "torch 2.13 c10/cuda/CUDAException.cpp; ggml-cuda.cu ggml_cuda_error"),
            ("CUDA driver error: out of memory", "torch 2.13 c10/cuda/driver_api.h"),
            ("cudaErrorMemoryAllocation", "CUDA 13 driver_types.h"),
            ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA 13 cuda.h"),
            ("cuda runtime error (2) : out of memory", "torch 1.4 THCCheck"),
            ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA 13 cublas_api.h: a handle's workspace does not fit"),
            ("CUDNN_STATUS_ALLOC_FAILED", "cudnn.h"),
            ("HIP error: out of memory", "torch 2.13, ROCm"),
            ("Cuda failure 2 'out of memory'", "nccl 2.28 src/include/checks.h"),
            (
                "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
                "torch 2.13 c10/cuda/CUDACachingAllocator.cpp: NVML is asked for "
                "processes to name in the message, and fails itself",
            ),
        )
    ),
    Form("NCCL", DRIVER, "Failed to CUDA calloc async <request>", (), "nccl 2.28 src/include/alloc.h"),
    Form(
        "bitsandbytes",
        DRIVER,
        "Error out of memory at line",
        (),
        "bitsandbytes 0.50 csrc/pythonInterface.cpp: cudaMallocManaged of a paged state",
    ),
    # the host
    Form("shell", KILLED, "line <*>: <killed_pid> Killed", (), "bash, of a job that SIGKILL ended"),
    Form("Linux", KILLED, "Out of memory: Killed process <killed_pid>", (), "linux mm/oom_kill.c"),
    Form("Linux", KILLED, "oom-kill:", (), "linux mm/oom_kill.c dump_oom_summary"),
    Form("Kubernetes", KILLED, "OOMKilled", (), "kubernetes: a container over its memory limit, exit code 137"),
    Form("Slurm", KILLED, "oom_kill event", (), "slurm src/plugins/cgroup"),
    Form("Slurm", KILLED, "oom-kill event", (), "slurm src/plugins/cgroup"),
    Form(
        "torch",
        KILLED,
        "Signal 9 (SIGKILL) received by PID",
        (),
        "torch 2.13 torch/distributed/elastic/multiprocessing",
    ),
    Form("torch", KILLED, "is killed by signal: Killed", (), "torch 2.13 torch/utils/data/_utils/signal_handling.py"),
    Form(
        "torch",
        HOST,
        "dataloader's workers are out of shared memory",
        (),
        "torch 2.13 torch/utils/data/_utils/signal_handling.py",
    ),
    Form("shell", KILLED, "died with <Signals.SIGKILL: 9>", (), "python subprocess, as DeepSpeed's launcher prints it"),
    Form("DeepSpeed", KILLED, "exits with return code = -9", (), "deepspeed 0.19 deepspeed/launcher/launch.py"),
    Form("shell", KILLED, "exit code 137", (), "128 + SIGKILL"),
    Form("shell", KILLED, "exit code: 137", (), "128 + SIGKILL"),
    Form("shell", KILLED, "exitcode : -9", (), "torch 2.13 torch/distributed/elastic/multiprocessing/errors"),
    Form("shell", KILLED, "exitcode: -9", (), "torch 2.13 torch/distributed/elastic/multiprocessing/api.py"),
    Form("shell", KILLED, "Killed<line end>", (), "bash, of a job that SIGKILL ended"),
    Form("Linux", HOST, "Cannot allocate memory", (), "errno ENOMEM"),
    Form("numpy", HOST, "Unable to allocate <request> for an array with shape", (), "numpy 2.3 _core/_exceptions.py"),
    Form("python", HOST, "MemoryError<line end>", (), "python"),
    # what memplan recognises and does not explain
    Form("JAX", OTHER, "RESOURCE_EXHAUSTED: Out of memory", ("while trying to allocate <request>",), "xla"),
    Form("TensorFlow", OTHER, "OOM when allocating tensor with shape<shape>", (), "tensorflow"),
    Form("Java", OTHER, "java.lang.OutOfMemoryError", (), "java"),
    Form("Node.js", OTHER, "JavaScript heap out of memory", (), "v8"),
    Form("MLX", OTHER, "[METAL] Command buffer execution failed: Insufficient Memory", (), "mlx"),
    Form(
        "PaddlePaddle", OTHER, "ResourceExhaustedError: Out of memory error on GPU", ("allocate <request>",), "paddle"
    ),
)

# Lines that say what a process held before it died, or who wrote the log. The last one of each is reported.
STATEMENTS: tuple[Form, ...] = (
    Form("vLLM", BUDGET, "Available KV cache memory: <available>", (), "vllm 0.11 vllm/v1/worker/gpu_worker.py"),
    Form("vLLM", BUDGET, "GPU KV cache size: <tokens> tokens", (), "vllm 0.11 vllm/v1/core/kv_cache_utils.py"),
    Form("vLLM", BUDGET, "kv_cache_size=<kv>", (), "vllm 0.6 vllm/worker/worker.py"),
    Form("vLLM", BUDGET, "Model loading took <weights>", (), "vllm 0.11 vllm/v1/worker/gpu_model_runner.py load_model"),
    Form("vLLM", BUDGET, "model weights take <weights>", (), "vllm 0.7 vllm/worker/worker.py"),
    Form("vLLM", BUDGET, "non_torch_memory takes <non_torch>", (), "vllm 0.7 vllm/worker/worker.py"),
    Form("vLLM", BUDGET, "PyTorch activation peak memory takes <activations>", (), "vllm 0.7 vllm/worker/worker.py"),
    Form("vLLM", BUDGET, "the rest of the memory reserved for KV Cache is <kv>", (), "vllm 0.7 vllm/worker/worker.py"),
    Form("vLLM", BUDGET, "max seq len (<max_len>)", (), "vllm 0.11 vllm/v1/core/kv_cache_utils.py"),
    Form("SGLang", BUDGET, "Load weight end<*>mem usage=<weights>", (), "sglang 0.5 model_runner.py load_model"),
    Form("SGLang", BUDGET, "max_total_num_tokens=<tokens>", (), "sglang 0.5 scheduler.py"),
    Form("DeepSpeed", GPU, "Max_MA <peak>", (), "deepspeed 0.19 deepspeed/runtime/utils.py see_memory_usage"),
    Form("llama.cpp", GPU, "model buffer size = <weights>", (), "llama.cpp b9000 src/llama-model.cpp load_tensors"),
    Form("llama.cpp", GPU, "KV buffer size = <kv>", (), "llama.cpp b9000 src/llama-kv-cache.cpp"),
    Form("llama.cpp", GPU, "compute buffer size = <activations>", (), "llama.cpp b9000 src/llama-context.cpp"),
)


@cache
def pattern(part: str) -> re.Pattern[str]:
    """Return the regular expression of a part of a form: spaces may be any white space, even a line's end."""
    out: list[str] = []
    for piece in re.split(r"(<\*>|<line end>|<\w+>)", part):
        if piece == "<*>":
            out.append(r"[^\n\f]{0,120}?")
        elif piece == "<line end>":
            out.append(r"\s*?$")
        elif piece[:1] == "<" and piece[1:-1] in FIELDS:
            out.append(f"(?P<{piece[1:-1]}>{_KINDS[FIELDS[piece[1:-1]]]})")
        else:
            out.append(r"\s+".join(map(re.escape, re.split(r" +", piece))))
    if part[:1].isalnum():
        out.insert(0, r"(?<!\w)")
    return re.compile("".join(out), re.MULTILINE)


@cache
def keyword(part: str) -> str:
    """Return the longest word of a part that every text with it has: a quick test."""
    return max(re.sub(r"<\*>|<line end>|<\w+>", " ", part).split(), key=len)
