"""NVIDIA Hopper: TMA, mbarrier, wgmma, warp specialisation."""
