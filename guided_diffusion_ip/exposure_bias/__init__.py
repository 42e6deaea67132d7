"""The exposure-bias laboratory: measure how far the sampling chain drifts from what the network was trained on, and find
a lambda(t) that brings it back.

    walks           the four ways to visit noisy images: as in training, and along chains
    measures        five measures as sums over images, and what they come to
    measure_run     the same over many images and processes, continued after an interruption
    plots           a picture for each measure
    calibrate       lambda(t) per step, without samples and without FID
    sweep           a grid of settings from one YAML (sweep_run computes its cells, sweep_table makes the table)
    report          one HTML page about runs, sweeps and measurements (report_data, report_curves, report_plots, report_html)
    schedule_file   the YAML with lambda(t) that samplers read (--eps_schedule)
"""
