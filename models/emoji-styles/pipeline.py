# For diffusers: DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True). It needs the package t2i.

from t2i import Text2ImagePipeline  # noqa: F401
