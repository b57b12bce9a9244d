"""What a step and a load would take at best on a device that is not at hand, by its data sheet.

The roofline of ``lorax plan``, split into the parts that a step consists of: a floor, which no
server reaches. Nothing is measured here; the noise of steps is none. Reading an adapter is its
bytes over a disk's bandwidth, which is assumed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.cluster_simulation.costs import Costs
from benchmarks.measure import digits
from benchmarks.record import write_result
from lorax_serve.checkpoint.spec import DecoderSpec
from lorax_serve.checkpoint.spec_cache import load_spec
from lorax_serve.cli.devices import DEVICES, Device
from lorax_serve.model.sizes import (
    adapter_bytes,
    form_of,
    kv_bytes_per_token,
    multiplied_parameters,
    target_modules,
)

# The shape of Llama 3.1 8B.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
DTYPE = torch.bfloat16


def roofline(spec: DecoderSpec, device: Device, one: int, options: argparse.Namespace) -> Costs:
    """Costs at best.

    Args:
        spec: of the base model.
        device: of a replica.
        one: bytes of an adapter.
        options: the bandwidths of the link to the device and of the disk, and ``context``.
    """
    linears, head = multiplied_parameters(spec)
    return Costs(
        step=DTYPE.itemsize * (linears + head) / device.bandwidth,
        decode=options.context * kv_bytes_per_token(spec, DTYPE) / device.bandwidth,
        prompt_token=2 * linears / device.flops,
        adapter=one / device.bandwidth,
        put=one / options.link_bandwidth,
        beside_load=0.0,
        noise=(1.0,),
        loads=(one / options.disk_bandwidth,),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, help="a directory with config.json (default: of an 8B Llama)")
    add("--device", choices=DEVICES, default="h100")
    add("--rank", type=int, default=16)
    add("--context", type=int, default=160, help="tokens of a sequence, in the mean")
    add("--link-bandwidth", type=float, default=64e9, help="bytes a second: PCIe 5.0, 16 lanes")
    add("--disk-bandwidth", type=float, default=2e9, help="bytes a second; assumed")
    add("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    device = DEVICES[options.device]
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(CONFIG))
        spec = load_spec(options.config or Path(place))
    form = form_of(spec, DTYPE, on_gpu=device.on_gpu)
    paths = target_modules(spec, "all-linear")
    one = adapter_bytes(spec, options.rank, paths, DTYPE, form)
    costs = roofline(spec, device, one, options)
    headline = {
        "step_ms": digits(1e3 * costs.step),
        "decode_ms": digits(1e3 * costs.decode),
        "prompt_token_ms": digits(1e3 * costs.prompt_token),
        "adapter_ms": digits(1e3 * costs.adapter),
        "put_ms": digits(1e3 * costs.put),
        "load_ms": digits(1e3 * costs.loads[0]),
    }
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "out"
    }
    content = {
        "kind": f"floor: the roofline of {device.name} by its data sheet; nothing is measured",
        "settings": settings | {"dtype": "bfloat16", "shape": None if options.config else CONFIG},
        "headline": headline,
        "costs": costs.as_json(),
        "adapter_bytes": one,
        "on_gpu": device.on_gpu,
    }
    write_result(options.out, "cluster_roofline", content)
    print(json.dumps(headline))


if __name__ == "__main__":
    main()
