"""What needs several parts of the package: the commands, the quickstart, the training of the small backbones."""
