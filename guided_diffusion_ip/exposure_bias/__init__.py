"""The exposure-bias laboratory: measure how far the sampling chain drifts from what the network was
trained on, and find a lambda(t) that brings it back.

    walks           the four ways to visit noisy images: as in training, and along chains
    measures        five measures as sums over images, and what they come to
    measure_run     the same over many images and processes, continued after an interruption
    plots           a picture for each measure
    calibrate       lambda(t) per step, without samples and without FID
"""
