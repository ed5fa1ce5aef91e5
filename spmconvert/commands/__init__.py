"""The commands, one file each, readable top to bottom; also what ``import spmconvert`` offers."""
