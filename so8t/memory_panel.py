"""The report's panel on memory: the plan of the run's configuration by part, beside what the run logged of itself."""

from functools import partial

from omegaconf import OmegaConf

from so8t.config import validate
from so8t.errors import BaseModelError, SO8TError
from so8t.memory import plan
from so8t.page import Panel, Table, drawn
from so8t.plan_view import by_part, plot_plan
from so8t.run_folder import CONFIG, RunFolder
from so8t.shapes import is_at_hand


def memory_panel(run: RunFolder) -> Panel:
    """What takes the memory, as `so8t plan` predicts it; a configuration that cannot be planned here is told."""
    panel = Panel("memory", "Memory by part")
    if run.config is None:
        panel.misses(CONFIG)
        return panel
    try:
        config = validate(OmegaConf.create(run.config))
        if not is_at_hand(config.base):
            raise BaseModelError(f"the sizes of base {config.base.name} are not at hand, and a report asks no network")
        planned = plan(config)
    except SO8TError as error:
        panel.absent.append(f"not planned, so not shown: {error}")
        return panel
    panel.note = (
        "Peaks of the longest training step and validation batch that the run's settings allow on this machine, as so8t plan "
        "predicts them."
    )
    logged = (run.series or {}).get("memory/peak_gib")
    if logged:
        panel.note += (
            f" The run itself logged {logged[-1][1]:.2f} GiB: on a GPU what PyTorch allocated, on a CPU the whole process, "
            "Python and its libraries included."
        )
    alt = "Planned memory by part at the peak"
    panel.pictures.append(drawn(panel.key, alt, partial(plot_plan, config, planned), wide=True))
    heads = ["at the peak of", *(f"a {phase}" for phase in planned.phases)]
    panel.tables.append(Table("planned, not measured", heads, by_part(planned)))
    return panel
