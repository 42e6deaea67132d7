"""Studies over many runs.

sweep        a grid of settings from one YAML (sweep_run computes its cells, sweep_table makes the
             table)
report       one HTML page about runs, sweeps and measurements (report_data reads them,
             report_curves and exposure_bias/plots draw, report.html is the template)
"""
