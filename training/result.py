"""The networks as they are judged and published: whole, in float32, never compiled, averaged if the run averages."""

import copy
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import nn

from checkpoints import put_in_place
from objective import Objective
from publish import strip_local_paths


class Result:
    """A copy of the networks that learn, refreshed when it is needed.

    Args:
        accelerator: Of the run.
        objective: What learns, before it is prepared.
        output_dir: Where it is written.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, output_dir: Path) -> None:
        self.accelerator = accelerator
        self.objective = copy.deepcopy(objective).eval().requires_grad_(False).to(accelerator.device)
        self.output_dir = output_dir
        # FSDP and DeepSpeed split the weights up: only their own calls can put them together, in the first process.
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def refresh(self, learning: nn.Module, ema: EMAModel | None) -> None:
        """Takes over the weights, or their average. All processes call it at the same time."""
        state = self.accelerator.get_state_dict(learning)
        if self.sharded and not self.accelerator.is_main_process:
            return
        self.objective.load_state_dict(state)
        if ema is not None:
            ema.copy_to(self.objective.parameters())

    def save(self, name: str, card: str) -> None:
        """Writes networks and model card to the folder `name` of `output_dir`, or to `output_dir` itself for ".".

        Parts appear whole, in the place of what was there.

        Raises:
            OSError: It could not be written, for want of space for instance. What was there is as it was.
        """
        temporary = self.output_dir / f".{name}.incomplete"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self.objective.save(temporary)
            strip_local_paths(temporary)
            (temporary / "README.md").write_text(card)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"The networks could not be written to {str(self.output_dir / name)!r}: {error}.") from error
        parts = [temporary] if name != "." else [*temporary.iterdir()]
        for part in parts:
            put_in_place(part, self.output_dir / (name if name != "." else part.name))
        shutil.rmtree(temporary, ignore_errors=True)
