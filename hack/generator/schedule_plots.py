"""Draws docs/images/schedules.svg: every learning-rate schedule as `optim.factor` computes it, in small pictures of one scale.

A few lines of SVG instead of a plotting library: the file is the same byte for byte wherever it is made, so that a test can compare it.
"""

from html import escape

from finetune_api.hyperparameters import Schedule, ScheduleType
from finetune_trainer import optim

STEPS = 100
COLUMNS = 5
CELL_WIDTH, CELL_HEIGHT = 200, 170
MARGIN = 12
PLOT_LEFT, PLOT_TOP, PLOT_WIDTH, PLOT_HEIGHT = 18, 50, 168, 96
FOOT = 34
FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
INK, PALE, GRID, CURVE = "#1f2328", "#59636e", "#d1d9e0", "#0969da"
PLATEAUS = (40, 60, 80)
"""Steps of the evaluations after which ReduceOnPlateau falls, as an example."""
WORDS = {
    ScheduleType.CONSTANT: "stays at the peak",
    ScheduleType.LINEAR: "a line to 0",
    ScheduleType.COSINE: "half a cosine to 0",
    ScheduleType.COSINE_RESTARTS: f"cycles {Schedule.defaults['cycles']:g}",
    ScheduleType.POLYNOMIAL: f"power {Schedule.defaults['power']:g}",
    ScheduleType.INVERSE_SQRT: "with the root of the step",
    ScheduleType.ONE_CYCLE: "warmup 0.3",
    ScheduleType.WARMUP_STABLE_DECAY: f"decay {Schedule.defaults['decay']:g}",
    ScheduleType.SLANTED_TRIANGULAR: "from and to 1/32 of the peak",
    ScheduleType.REDUCE_ON_PLATEAU: f"factor {Schedule.defaults['factor']:g}, three plateaus",
}


def svg() -> str:
    """The whole picture."""
    # The fields of the schedules have their defaults, which the words name; only the warm-up is made long enough to be seen.
    found = [Schedule(type=kind, warmup=0.3 if kind is ScheduleType.ONE_CYCLE else 0.1) for kind in ScheduleType]
    width = COLUMNS * CELL_WIDTH + 2 * MARGIN
    height = -(-len(found) // COLUMNS) * CELL_HEIGHT + 2 * MARGIN + FOOT
    cells = [
        f'<g transform="translate({MARGIN + i % COLUMNS * CELL_WIDTH},{MARGIN + i // COLUMNS * CELL_HEIGHT})">\n{_cell(schedule)}\n</g>'
        for i, schedule in enumerate(found)
    ]
    says = "Share of the peak learning rate from the first to the last step. Shaded: warm-up, the first tenth where nothing else is said."
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="{FONTS}">',
            "<title>The learning-rate schedules</title>",
            f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
            *cells,
            f'<text x="{width / 2:g}" y="{height - 20}" font-size="13" text-anchor="middle" fill="{PALE}">{says}</text>',
            "</svg>\n",
        ]
    )


def _cell(schedule: Schedule) -> str:
    floor, right = PLOT_TOP + PLOT_HEIGHT, PLOT_LEFT + PLOT_WIDTH
    falls = PLATEAUS if schedule.type is ScheduleType.REDUCE_ON_PLATEAU else ()
    shares = [optim.factor(schedule, step, STEPS, sum(step >= fall for fall in falls)) for step in range(STEPS)]
    line = " ".join(f"{_x(step):.1f},{floor - PLOT_HEIGHT * share:.1f}" for step, share in enumerate(shares))
    warm = PLOT_WIDTH * schedule.warmup
    parts = [
        f'<rect x="{PLOT_LEFT}" y="{PLOT_TOP}" width="{warm:.1f}" height="{PLOT_HEIGHT}" fill="{GRID}" opacity="0.45"/>',
        *(
            f'<path d="M{PLOT_LEFT} {y}H{right}" stroke="{GRID}" stroke-width="1" stroke-dasharray="{dash}"/>'
            for y, dash in ((PLOT_TOP, "3 3"), (floor, "none"))
        ),
        *(
            f'<text x="{PLOT_LEFT - 5}" y="{y + 4}" font-size="11" text-anchor="end" fill="{PALE}">{share}</text>'
            for y, share in ((PLOT_TOP, 1), (floor, 0))
        ),
        *(f'<path d="M{_x(fall):.1f} {PLOT_TOP}V{floor}" stroke="{PALE}" stroke-dasharray="2 3"/>' for fall in falls),
        f'<polygon points="{PLOT_LEFT},{floor} {line} {right},{floor}" fill="{CURVE}" opacity="0.1"/>',
        f'<polyline points="{line}" fill="none" stroke="{CURVE}" stroke-width="2" stroke-linejoin="round"/>',
        f'<text x="{PLOT_LEFT}" y="22" font-size="14" font-weight="600" fill="{INK}">{escape(schedule.type)}</text>',
        f'<text x="{PLOT_LEFT}" y="40" font-size="12" fill="{PALE}">{escape(WORDS[schedule.type])}</text>',
    ]
    return "\n".join(parts)


def _x(step: int) -> float:
    return PLOT_LEFT + PLOT_WIDTH * step / (STEPS - 1)
