"""The diffusion process: schedules, noising, objectives, samplers. Nothing here knows a network.

A denoiser is a function (z_t int32 [B, L], t float32 [B]) -> logits float [B, L, V]. V counts the
mask's token, `mask_id`.
"""
