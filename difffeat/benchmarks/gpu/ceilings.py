"""What the card can do at most: copies, square products, the four products of a block in every form, attention in every backend, fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from difffeat.benchmarks.gpu.journal import Journal
from difffeat.benchmarks.gpu.sizes import Sizes
from difffeat.benchmarks.timing import device_seconds
from difffeat.engines.torch_precision import exact_products

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
DTYPES = ("fp16", "bf16", "fp32", "tf32")


def square_rate(sizes: Sizes, dtype: str) -> float:
    """Rate of a large square product in `dtype` (`tf32`: fp32 values), in FLOP/s: what shares of the ceiling are shares of."""
    import torch

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    x, w = (torch.randn(sizes.side, sizes.side, device=sizes.device).to(kind) for _ in range(2))
    with exact_products(tf32=dtype == "tf32"):
        timing = device_seconds(lambda: x @ w, sizes.device, warm=sizes.warm, seconds=sizes.seconds)
    return 2 * sizes.side**3 / timing.median


def run(journal: Journal, sizes: Sizes) -> None:
    """The step: every row beside the others, those that cannot run with the reason."""
    import torch

    with torch.inference_mode():
        _copies(journal, sizes, torch)
        for dtype in DTYPES:
            attempt(journal, f"{dtype} product, {sizes.side} cubed", lambda name, dtype=dtype: _square(journal, sizes, name, dtype))
        _products(journal, sizes, torch)
        _attention(journal, sizes, torch)


def run_fp8(journal: Journal, sizes: Sizes) -> None:
    """The step on fp8: what its products would bring, beside fp16. There are no fp8 graphs yet: these rows say whether they would pay."""
    import torch

    with torch.inference_mode():
        for what, k, n in _shapes(sizes):
            attempt(journal, f"{what} fp8, scales a row", lambda name, k=k, n=n: _fp8(journal, sizes, torch, name, k, n))


def attempt(journal: Journal, name: str, work: Callable[[str], object]) -> None:
    """One row; one that fails costs its own line."""
    try:
        work(name)
    except Exception as error:  # whatever a library of the card says: the row tells it, and the next one runs
        journal.note(name, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'it does not say why'}")


def _copies(journal: Journal, sizes: Sizes, torch: Any) -> None:
    source, target = (torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=sizes.device) for _ in range(2))
    source.random_()
    timing = device_seconds(lambda: target.copy_(source), sizes.device, warm=sizes.warm, seconds=sizes.seconds)
    journal.note("device copy, bytes read and written", tb_a_second=2 * sizes.copy_bytes / timing.median / 1e12, n=len(timing.seconds))


def _square(journal: Journal, sizes: Sizes, name: str, dtype: str) -> None:
    journal.note(name, tflops=square_rate(sizes, dtype) / 1e12)


def _shapes(sizes: Sizes) -> list[tuple[str, int, int]]:
    width = sizes.dit.width
    return [("qkv", width, 3 * width), ("proj", width, width), ("fc1", width, 4 * width), ("fc2", 4 * width, width)]


def _products(journal: Journal, sizes: Sizes, torch: Any) -> None:
    """Both layouts of the weight, bias and GELU apart and in the kernel of the product."""
    rows = sizes.latents_batch * sizes.tokens
    for what, k, n in _shapes(sizes):
        x, bias, weight = torch.randn(rows, k), torch.randn(n), torch.randn(k, n)
        x, bias, weight = (tensor.to(sizes.device, torch.float16) for tensor in (x, bias, weight))
        for layout, w in (("[in, out]", weight), ("[out, in] turned", weight.t().contiguous().t())):
            for form, product in _forms(torch, x, bias, w, what == "fc1").items():
                name = f"{what} {layout} {form}"
                attempt(journal, name, lambda name, product=product, k=k, n=n: _product(journal, sizes, name, product, 2 * rows * k * n))


def _forms(torch: Any, x: Any, bias: Any, w: Any, gelu: bool) -> dict[str, Callable[[], Any]]:
    plain: dict[str, Callable[[], Any]] = {"mm": lambda: x @ w, "mm, + bias": lambda: (x @ w) + bias, "addmm": lambda: torch.addmm(bias, x, w)}
    if not gelu:
        return plain
    apart = {"addmm, gelu": lambda: torch.nn.functional.gelu(torch.addmm(bias, x, w), approximate="tanh")}
    return plain | apart | {"addmm with gelu": lambda: torch._addmm_activation(bias, x, w, use_gelu=True)}


def _product(journal: Journal, sizes: Sizes, name: str, product: Callable[[], Any], flop: int) -> None:
    with exact_products():
        timing = device_seconds(product, sizes.device, warm=sizes.warm / 3, seconds=sizes.seconds / 3)
    journal.note(name, tflops=flop / timing.median / 1e12, us_a_run=timing.median * 1e6, n=len(timing.seconds))


def _fp8(journal: Journal, sizes: Sizes, torch: Any, name: str, k: int, n: int) -> None:
    """Scales of every row of x are made in the run, as a graph would have to; those of the weight are there."""
    rows, limit = sizes.latents_batch * sizes.tokens, 448.0
    x, w = torch.randn(rows, k, device=sizes.device).half(), torch.randn(n, k, device=sizes.device)
    w_scale = w.abs().amax(1, keepdim=True).float() / limit
    w8 = (w / w_scale).to(torch.float8_e4m3fn)

    def scaled() -> tuple[Any, Any]:
        scale = x.abs().amax(1, keepdim=True).float() / limit
        return (x / scale).to(torch.float8_e4m3fn), scale

    x8, x_scale = scaled()

    def product(x8: Any, x_scale: Any) -> Any:
        return torch._scaled_mm(x8, w8.t(), scale_a=x_scale, scale_b=w_scale.t().contiguous(), out_dtype=torch.bfloat16, use_fast_accum=True)

    exact, found = x.float() @ w.t(), product(x8, x_scale).float()
    error = float((found - exact).norm() / exact.norm())
    times = [
        device_seconds(run, sizes.device, warm=sizes.warm / 3, seconds=sizes.seconds / 3)
        for run in (lambda: product(x8, x_scale), lambda: product(*scaled()))
    ]
    tflops, made = (2 * rows * k * n / timing.median / 1e12 for timing in times)
    journal.note(name, tflops=tflops, with_scales_made_uncompiled=made, relative_l2=error, n=len(times[0].seconds))


def _attention(journal: Journal, sizes: Sizes, torch: Any) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, tokens, batch = sizes.dit.heads, sizes.tokens, sizes.latents_batch
    shapes = {
        f"DiT, {heads} heads of {sizes.dit.width // heads}": (batch, heads, tokens, sizes.dit.width // heads),
        "VAE, one head": (sizes.pixels_batch, 1, sizes.dit.input_size**2, sizes.vae["block_out_channels"][-1]),
        "Plaid, heads of 64": (sizes.captions_batch, 32 if sizes.device == "cuda" else 2, 32, 64),
    }
    for what, (b, h, s, k) in shapes.items():
        q, key, value = qkv = torch.randn(b, s, 3, h, k, device=sizes.device).half().permute(2, 0, 3, 1, 4).unbind(0)
        work = 4 * b * h * s * s * k
        for backend in BACKENDS:

            def attend(name: str, backend: str = backend, q: Any = q, key: Any = key, value: Any = value, work: int = work) -> None:
                with sdpa_kernel(getattr(SDPBackend, backend)):
                    _product(journal, sizes, name, lambda: torch.nn.functional.scaled_dot_product_attention(q, key, value), work)

            attempt(journal, f"{what}: {backend.lower()}", attend)
        attempt(journal, f"{what}: plain products", lambda name, qkv=qkv, work=work: _plain(journal, sizes, name, qkv, work))


def _plain(journal: Journal, sizes: Sizes, name: str, qkv: tuple[Any, Any, Any], work: int) -> None:
    import torch

    q, k, v = (tensor.flatten(0, 1) for tensor in qkv)
    zero, scale = q.new_zeros(1, 1, 1), q.shape[-1] ** -0.5

    def attend() -> Any:
        return torch.bmm(torch.baddbmm(zero, q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1), v)

    _product(journal, sizes, name, attend, work)
