"""What the benchmarks compare: our code, peers and the book's code, each as a function that does the same work."""

LIGHT, HEAVY, LARGE = "squeezenet1_1", "resnet50", "resnet152"  # encoders
LITE = "timm/tf_efficientnet_lite0"
NUM_WORDS = 9956  # COCO's, in the book
CAPTION_STEPS = 12  # mean tokens of COCO's captions, `<end>` included
