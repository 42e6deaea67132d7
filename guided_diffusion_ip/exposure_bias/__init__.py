"""The exposure-bias laboratory: measure how far the sampling chain drifts from what the network was
trained on, and find a lambda(t) that brings it back.

    walks           the four ways to visit noisy images: as in training, and along chains
    measures        the measures as sums over images, and what they come to
    sums            running sums, and their means and variances
    discretisation  the measure that tells exposure bias from finite steps
    measure_run     the same over many images and processes, continued after an interruption
    plots           a picture for each measure
    calibrate       lambda(t): the rules by name
    common_noise    the rule that is used: distances of finished images, a parabola
    chains frechet_rule line_search                  what it is made of (and metrics.replicates)
    calibration_picture                  its curve
    final_variance  a cheap rule; greedy, quotient: diagnostics
"""
