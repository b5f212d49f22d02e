"""placeholder until the branch arrives"""


def make(config, channels):
    return None
