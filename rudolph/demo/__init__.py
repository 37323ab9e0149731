"""The demo in the browser: ``rudolph demo``.

Pure functions turn a request into a result: ``generating``, ``describing``, ``looking_inside`` and
``claims``.  ``tabs/`` and ``app`` hold the widgets, and only they import Gradio.
"""
