"""Writes the dashboards that the chart ships: `python -m deploy.grafana` from the repository's root."""

from pathlib import Path

from deploy.grafana import pool, run
from deploy.grafana.panels import text

FOLDER = Path(__file__).parents[1] / "helm" / "stillhouse" / "files" / "dashboards"
DASHBOARDS = {"pool.json": pool.dashboard, "run.json": run.dashboard}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, made in DASHBOARDS.items():
        (FOLDER / name).write_text(text(made()))
        print(FOLDER / name)


if __name__ == "__main__":
    main()
