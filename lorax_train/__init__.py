"""Train one LoRA adapter on a frozen causal language model, and write it in PEFT's format.

``lorax-train`` (``lorax_train.cli``) is the usual way in. From Python::

    from lorax_train.config import DataConfig, OutputConfig, TrainConfig
    from lorax_train.run import train

    train(TrainConfig(data=DataConfig(Path("rows.jsonl")), output=OutputConfig(Path("out"))))

Of ``lorax_serve`` it uses the adapter leaf, the errors and the model's source, and nothing else.
"""
