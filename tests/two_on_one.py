"""Train as tests/book_loop.py does, as one of two processes on one device: NCCL refuses that, gloo does not.

python tests/two_on_one.py OUT, with RANK, WORLD_SIZE, LOCAL_RANK=0 and the address in the environment.
"""

import sys

import book_loop
import torch

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")  # accelerate takes what is there
    book_loop.main(sys.argv[1], "sum", "2", "eval")
