"""The Triton kernel on a CPU by its interpreter, in a process of its own: Triton reads the variable on import."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

_PROGRAM = """
import itertools, torch
from graftline.weights.quant.blockwise import constants, dequantize, quantize
from graftline.weights.quant.scheme import Scheme, code_table
from graftline.weights.quant.triton_kernels import decode_blocks

torch.manual_seed(0)
for code, shape in itertools.product(("nf2", "nf3", "nf4"), ((40, 33), (1025,))):
    scheme = Scheme(code, 32, True)
    weight = quantize(torch.randn(shape), scheme)
    for dtype in (torch.float32, torch.float16):  # the interpreter cuts bf16 off instead of rounding
        found = decode_blocks(
            weight.packed, code_table(code), constants(weight.absmax), shape=shape, scheme=scheme, dtype=dtype
        )
        assert torch.equal(found, dequantize(weight, dtype)), (scheme, shape, dtype)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: it comes with torch's CUDA wheels")
def test_the_kernel_gives_the_bits_of_the_plain_decoder_for_every_code() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_cuda_gives_the_bits_of_the_plain_decoder() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_default_device('cuda')\n" + _PROGRAM],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
