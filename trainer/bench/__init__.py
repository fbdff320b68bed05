"""`python -m trainer bench`: this trainer and a plain reference, side by side on this machine.

Same model, pictures, captions, layers, rank, dtype, draws and number of steps; each side in a process of its own, one after the other.
The models have the real architectures with random weights, written for it and deleted after it; nothing is downloaded.

    sides      starts the processes and puts their findings together
    case       what is timed
    models     bases of the real architectures with random weights
    child      a process; machine, ours and reference are what it can be
    meter      the clock of both sides
    report     the findings as text, and against older ones
    scaling    several processes against one (--processes), without the reference

The JSON has

    ours, reference   first_step_s (from the start of the process to the end of its first step), step_ms (median), images_per_s (of all
                      timed steps), gpu_busy_ms (kernel time of a step; null without CUDA), peak_device_gib (tensors, from the first step
                      on, CUDA graphs' pools included; null without CUDA), peak_host_gib, final_loss (mean of the last timed steps);
                      and start (where the seconds to the first step went), device (peak_start_gib: tensors before the first step;
                      peak_reserved_gib: what torch took from the device; used_gib: all that is used there, at the end), kernels (of a
                      step), share_of_limit, parameters (that are trained), trained_norm (of the adapters' `up` after
                      the timed steps)
    speedup           the reference's step_ms over ours
    share_of_limit    the time that a step's arithmetic takes at the rate of large products of matrices, over our median time
    limit             matmul_tflops (measured here), step_tflop (counted on the reference's step, without what checkpointing repeats)
    preview           seconds for one set of sample images at the product's settings, pictures, worth_steps; times that a run of
                      1,500 steps makes them by itself, share_of_run that they take then
    versions, device, case

The losses and norms of both sides agree to rounding; where they do not, the text says so. Triton keeps the kernels that it has compiled,
so the very first run on a machine takes some seconds more to its first step.

Latents are cached on both sides, in ours as always, in the reference because some of diffusers' scripts do it and equal work is wanted.
"""
