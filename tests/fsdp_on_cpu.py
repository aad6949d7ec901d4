"""
Lets accelerate spread a model over processes without GPUs: it takes FSDP for accelerators only (`AcceleratorState` never
makes it of `MULTI_CPU`), though torch's runs over gloo as well. As a script, runs train.py so; with STOP_AT_CHECKPOINT set,
until the first checkpoint is written, and then as if killed.
"""

import os
import signal

from accelerate import PartialState
from accelerate.utils import DistributedType

start = PartialState.__init__


def as_on_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_on_gpus

if __name__ == "__main__":
    import runpy

    from native_retrieval.trainer import NativeRetrievalTrainer

    if "STOP_AT_CHECKPOINT" in os.environ:
        save = NativeRetrievalTrainer._save_checkpoint

        def save_and_die(self, *args, **kwargs):
            save(self, *args, **kwargs)
            self.accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)

        NativeRetrievalTrainer._save_checkpoint = save_and_die
    runpy.run_path("train.py", run_name="__main__")
