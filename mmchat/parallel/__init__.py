"""One model over several processes: tensor parallel, by torch.distributed.

Rank 0 is the command itself; the others follow it. `slices` says which part of each weight a rank
holds, `group` has the sums and the gathering, `launch` starts the followers or joins those that a
launcher has started, `wire` says what one rank tells the others. Source of the cut: Shoeybi et al.
2019, Megatron-LM.
"""
