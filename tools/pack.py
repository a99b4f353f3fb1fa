"""How are features packed?

    python -m tools.pack --clip weights/tiny-clip --images pictures/ --out packed/
    python -m tools.pack --clip weights/tiny-clip --clips clips/ --out packed/
    python -m tools.pack --published DIR --out packed/      # an .h5 a picture or an .npz a clip

Then `python train.py --features packed/`. What lies in there: support/features.py. A run that was
stopped goes on when its command is given again.
"""
import argparse

from support.features import convert, extract
from support.gate import program
from support.published_clip import load_clip


@program
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Packs features of all that lies in a folder.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="folder of .jpg and .png pictures")
    source.add_argument("--clips", help="folder with a folder of frames, a .gif or a .webp a clip")
    source.add_argument("--published", help="folder with an .h5 file a picture or an .npz a clip")
    parser.add_argument("--clip", help="folder or .safetensors file of a CLIP, but for --published")
    parser.add_argument("--out", required=True, help="packed folder to write or to go on with")
    parser.add_argument("--resize", choices=("stretch", "crop"), default="stretch",
                        help="the whole picture without its aspect (as the papers), or its centre")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop",
                        help="what happens at a file that cannot be read")
    args = parser.parse_args(argv)
    if bool(args.clip) == bool(args.published):
        parser.error("--clip goes with --images or --clips")
    if args.published:
        skipped = convert(args.published, args.out, args.on_error)
    else:
        skipped = extract(load_clip(args.clip), args.images or args.clips, args.out,
                          clips=bool(args.clips), resize=args.resize, on_error=args.on_error)
    if skipped:
        print(f"{len(skipped)} unreadable files left out: {', '.join(skipped)}")


if __name__ == "__main__":
    main()
