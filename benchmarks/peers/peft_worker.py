"""transformers + PEFT as a worker: one ``generate`` a batch, adapters mixed by ``adapter_names``.

Attention is SDPA; adapters have the model's dtype (PEFT's default would compute them in float32);
without adapters it is plain transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.worker import TEMPERATURE, TOP_P, Requests, serve


class Peft:
    """See ``worker.Backend``."""

    packages = ("peft", "transformers", "torch")

    def __init__(self) -> None:
        self._model: Any = None
        self._has_adapters = False

    def prepare(self, model: str, adapters: dict[str, str], batch: int, dtype: str) -> None:
        from peft import PeftModel

        self.close()
        base = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        base.generation_config.eos_token_id = None
        self._model = base
        for name, path in adapters.items():
            keep = {"adapter_name": name, "autocast_adapter_dtype": False}
            if self._has_adapters:
                self._model.load_adapter(path, **keep)
            else:
                self._model = PeftModel.from_pretrained(base, path, **keep)
                self._has_adapters = True
        self._model.to(getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run(self, requests: Requests) -> list[int]:
        torch.manual_seed(requests[0]["seed"])
        prompts = torch.tensor([each["prompt"] for each in requests])
        (new_tokens,) = {each["new_tokens"] for each in requests}
        names = [each["adapter"] or "__base__" for each in requests]
        output = self._model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            top_k=0,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            **({"adapter_names": names} if self._has_adapters else {}),
        )
        return [output.shape[1] - prompts.shape[1]] * len(requests)

    def close(self) -> None:
        self._model = None
        self._has_adapters = False


if __name__ == "__main__":
    serve(Peft())
