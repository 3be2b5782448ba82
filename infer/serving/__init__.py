"""What infer/serve.py serves: captions of uploaded images, a page to drop images on, and a gallery to correct."""
