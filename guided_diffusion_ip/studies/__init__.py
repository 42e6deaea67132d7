"""Studies over many runs.

sweep        a grid of settings from one YAML (sweep_run computes its cells, sweep_table makes the
             table)
report       one HTML page about runs, sweeps and measurements (report_data, report_curves,
             report_plots, report_html)
"""
