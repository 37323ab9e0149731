"""The tab that shows the claims of the results folder, with verdicts and figures."""

from html import escape
from typing import Any

import gradio as gr

from rudolph.demo.claims import CLAIM_COLUMNS, claim_rows, experiments_in, result_page
from rudolph.demo.limits import Watch
from rudolph.demo.sessions import Demo
from rudolph.demo.tabs.widgets import connect


def add_results_tab(demo: Demo) -> None:
    """Add the tab."""
    with gr.Tab("Results", id="results") as tab:
        names = experiments_in(demo.results)
        if not names:
            gr.Markdown("No results here: start the demo in a checkout that has `results/`.")
            return
        gr.Markdown("Verdicts and effects are computed from the tables of the runs.")
        table = gr.Dataframe(
            headers=list(CLAIM_COLUMNS),
            column_widths=["22%", "40%", "14%", "24%"],
            interactive=False,
            wrap=True,
            max_height=360,
        )
        experiment = gr.Dropdown(names, value=names[0], label="Experiment")
        page = gr.Markdown()
        figures = gr.HTML()

    def show_claims(form: dict[str, Any], watch: Watch) -> list[Any]:
        return [claim_rows(demo.results), *show_page(form, watch)]

    def show_page(form: dict[str, Any], watch: Watch) -> list[Any]:
        shown = result_page(demo.results, form["experiment"])
        images = [
            f'<img src="{address}" alt="{escape(shown.title)}">' for address in shown.figures
        ]
        return [shown.text, f'<div class="figures">{"".join(images)}</div>']

    fields = {"experiment": experiment}
    connect(demo, tab.select, fields, [table, page, figures], show_claims)
    connect(demo, experiment.input, fields, [page, figures], show_page)
