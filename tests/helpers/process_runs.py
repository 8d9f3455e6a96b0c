"""Training by the command line in several processes: DDP or FSDP2, with a process that is killed at a step.

As a program, this is `bert4rec` for one of the processes. FSDP2 shards over CPU processes, a process can be killed, and
the peak memory of each can be written to a file.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from chain_runs import free_port

FSDP = Path(__file__).parent.parent.parent / "recipes" / "accelerate" / "fsdp.yaml"


def shard_without_gpus() -> None:
    """Let Accelerate shard over CPU processes.

    AcceleratorState accepts FSDP on accelerators only. On CPUs it silently uses DDP instead. This function makes the
    same settings for CPUs as AcceleratorState for GPUs. The plugin and `prepare` are those of Accelerate.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def as_on_gpus(self, *args, fsdp_plugin=None, **kwargs) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            assert self.distributed_type == DistributedType.MULTI_CPU
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = as_on_gpus


def kill_at(step: int, number: int) -> None:
    """Kill the process of this number, without a last word, at the end of a step."""
    from transformers import TrainerCallback

    from bert4rec_hf.training import trainer

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == step and args.process_index == number:
                os.kill(os.getpid(), signal.SIGKILL)

    original = trainer.Bert4RecTrainer.__init__

    def with_kill(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Kill())

    trainer.Bert4RecTrainer.__init__ = with_kill


def launch(num_processes: int, words: list, folder: Path, fsdp: bool = False, **variables: str):
    """Run `bert4rec` in so many processes, with FSDP2 as in recipes/accelerate/fsdp.yaml, but in float32.

    The processes may abort at interpreter exit after their work, so callers check files, and not the status.
    """
    command = [sys.executable, __file__, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    if fsdp:
        config = folder / "fsdp.yaml"
        on_cpus = {"num_processes": num_processes, "use_cpu": True, "mixed_precision": "no"}
        config.write_text(yaml.safe_dump(yaml.safe_load(FSDP.read_text()) | on_cpus))
        launcher = ["accelerate.commands.launch", "--config_file", config, "--main_process_port", free_port()]
        command = [sys.executable, "-m", *map(str, launcher), *command[1:]]
    elif num_processes > 1:
        launcher = ["torch.distributed.run", "--nproc_per_node", num_processes, "--master_port", free_port()]
        command = [sys.executable, "-m", *map(str, launcher), *command[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)


if __name__ == "__main__":
    import torch

    from bert4rec_hf.cli import main

    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        shard_without_gpus()
    if "KILL" in os.environ:
        kill_at(*map(int, os.environ["KILL"].split(",")))
    status = main()
    if "PEAKS" in os.environ:
        peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**20
        Path(f"{os.environ['PEAKS']}.peak-{os.environ.get('RANK', 0)}").write_text(str(peak))
    sys.exit(status)
