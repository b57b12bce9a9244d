import os

import torch

if not torch.cuda.is_available():
    # Read when triton is first imported, which several libraries do: its kernels run in its
    # interpreter then.
    os.environ.setdefault("TRITON_INTERPRET", "1")
