"""Recipes for hundreds of odd video files, written by an ffmpeg program and then cut, joined, filtered and rewritten.

Frame i of a source shows the number FIRST + i. `RECIPES[name](workshop, path)` writes one file.
"""

import functools
import itertools
import shlex
import subprocess
from pathlib import Path

from ffmpeg_truth import ffmpeg
from video_factory import draw_number
from video_patches import (
    avi_index,
    blocks,
    ctts,
    ebml,
    flv_tags,
    matrix,
    put,
    rename,
    swap,
    ts_flag,
    ts_packets,
    void,
)

FIRST = 0xB200  # its blocks look different however a frame is turned or mirrored
SIZE = (96, 128)
RECIPES = {}
ENCODED = "h264 hevc vvc vp8 vp9 av1 mpeg1 mpeg2 mpeg4 codecs uneven sound aspect size".split()  # families of sources


class CannotMake(Exception):
    """ffmpeg cannot write this file."""


@functools.lru_cache(4)
def raw_frames(count, size, first=FIRST):
    return b"".join(draw_number(first + i, *size).tobytes() for i in range(count))


class Workshop:
    """Makes the files of `RECIPES` in a folder, each once, for a recipe may start from another recipe's file."""

    def __init__(self, folder):
        self.folder, self.made = Path(folder), {}

    def file(self, name):
        """The path of the file; CannotMake."""
        if name not in self.made:
            path = self.folder / name.replace("/", "_")
            try:
                RECIPES[name](self, path)
                self.made[name] = path if path.exists() and path.stat().st_size else None
            except (CannotMake, subprocess.TimeoutExpired):
                self.made[name] = None
        if self.made[name] is None:
            raise CannotMake(name)
        return self.made[name]


def _add(name, make, *args, **kwargs):
    assert name not in RECIPES, name
    RECIPES[name] = lambda shop, path: make(shop, path, *args, **kwargs)


def _run(*args, stdin=None):
    status, _, log = ffmpeg(*args, stdin=stdin)
    if status:
        raise CannotMake(log[-500:])


def encode(shop, path, settings, frames=100, fps="25", size=SIZE, before="", first=FIRST):
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}", "-r", fps, *shlex.split(before)]
    _run(*source, "-i", "-", *shlex.split(settings), path, stdin=raw_frames(frames, size, first))


def remux(shop, path, source, before="", after=""):
    _run(*shlex.split(before), "-i", shop.file(source), "-map", "0", "-c", "copy", *shlex.split(after), path)


def join(shop, path, sources, after=""):
    listing = path.with_suffix(".list")
    listing.write_text("".join(f"file '{shop.file(source)}'\n" for source in sources))
    _run("-f", "concat", "-safe", "0", "-i", listing, "-c", "copy", *shlex.split(after), path)


def append(shop, path, sources):
    path.write_bytes(b"".join(shop.file(source).read_bytes() for source in sources))


def patch(shop, path, source, change):
    """A copy of a file after `change(data)` on its bytes, a bytearray."""
    data = bytearray(shop.file(source).read_bytes())
    try:
        change(data)
    except ValueError as error:  # it has no such part
        raise CannotMake(str(error)) from None
    path.write_bytes(data)


def table(text):
    """{"name": "options", ...} of "name: options; name: options; ..."."""
    items = [item.partition(": ") for item in " ".join(text.split()).strip("; ").split("; ")]
    return {name: options for name, _, options in items}


def _product(family, settings, containers, codec="", **kwargs):
    for (name, options), container in itertools.product(settings.items(), containers):
        _add(
            f"{family}/{name}.{container}", encode, codec + (options if options[:1] == ":" else f" {options}"), **kwargs
        )


# -- encoded: codecs, settings, containers

X264 = "-c:v libx264 -pix_fmt yuv420p -g 12"
OPEN264 = "-x264-params open-gop=1:bframes=3:min-keyint=12:scenecut=0:b-adapt=0"
H264 = {"open": OPEN264} | table("""
default; open-pyramid: -x264-params open-gop=1:bframes=7:b-pyramid=normal:b-adapt=0:scenecut=0;
closed-pyramid: -bf 5 -b-pyramid strict; no-pyramid: -bf 3 -b-pyramid none; no-b-frames: -bf 0; keyframes-only: -g 1;
16-b-frames: -g 40 -bf 16 -x264-params b-adapt=0:ref=16; one-keyframe: -g 1000; baseline: -profile:v baseline;
intra-refresh: -x264-params intra-refresh=1:keyint=20:bframes=0; lossless: -qp 0 -preset ultrafast;
intra-refresh-b: -x264-params intra-refresh=1:keyint=20:bframes=3; fake-interlaced: -x264-params fake-interlaced=1;
interlaced: -flags +ilme+ildct -x264-params tff=1:bframes=3; bottom-first: -x264-params bff=1:open-gop=1:bframes=3;
slices: -x264-params slices=4:sliced-threads=1; ten-bits: -pix_fmt yuv420p10le; 444: -pix_fmt yuv444p;
422: -pix_fmt yuv422p; delimiters-hrd: -x264-params aud=1:nal-hrd=vbr:vbv-maxrate=500:vbv-bufsize=500 -b:v 300k;
bluray: -x264-params bluray-compat=1:open-gop=1:slices=4:aud=1; zero-latency: -tune zerolatency;
forced-keyframes: -g 1000 -force_key_frames 0.5,0.54,1.9 -forced-idr 1; still-image: -tune stillimage -bf 8;
forced-not-idr: -g 1000 -force_key_frames 0.5,1.9 -x264-params open-gop=1;
stitchable: -x264-params stitchable=1:open-gop=1; no-deblock-cavlc: -x264-params cabac=0:no-deblock=1:weightp=0
""")
_product("h264", H264, ("mp4", "mkv", "ts"), X264)
_product("h264", {"open": OPEN264, "pyramid": "-bf 5", "plain": "-bf 0"}, ("mov", "avi", "flv", "nut", "m2ts"), X264)
_product("h264", {"open": OPEN264, "plain": "-bf 0"}, ("3gp", "f4v", "mpg", "asf", "mxf", "h264", "wtv", "ismv"), X264)
_product("h264", {"open": OPEN264}, ("m4v", "vob", "3g2", "264", "psp", "obu"), X264)
_product(
    "h264", {"fragments": "-movflags frag_keyframe+empty_moov", "faststart": "-movflags faststart"}, ("mp4",), X264
)
_product("h264", {"dash": "-movflags dash+frag_every_frame+delay_moov -bf 2"}, ("mp4", "mov"), X264)
_product("h264", {"negative-ctts": "-movflags negative_cts_offsets", "no-edits": "-use_editlist 0"}, ("mp4",), X264)
_product("h264", {"hybrid": "-movflags hybrid_fragmented", "tracks": "-write_tmcd 1"}, ("mov",), X264)
_product("h264", {"openh264": "-c:v libopenh264 -g 12 -b:v 300k"}, ("mp4", "mkv", "ts"))
_product("h264", {"rgb": "-c:v libx264rgb -qp 0 -preset ultrafast"}, ("mp4", "mkv"))

X265 = "-c:v libx265 -preset superfast -pix_fmt yuv420p -g 12 -x265-params log-level=none:keyint=12"
H265 = table("""
default; closed: :open-gop=0; leading: :open-gop=0:radl=2:bframes=4;
8-b-frames: :bframes=8:b-adapt=0:keyint=24:min-keyint=24; no-pyramid: :b-pyramid=0:bframes=4:b-adapt=0;
no-b-frames: :bframes=0; keyframes-only: :keyint=1; one-keyframe: :keyint=1000;
intra-refresh: :intra-refresh=1:keyint=20; interlaced: :interlace=tff; layers: :temporal-layers=3:bframes=4:b-adapt=0;
ten-bits: -pix_fmt yuv420p10le; 444: -pix_fmt yuv444p; repeated-headers: :repeat-headers=1:aud=1;
hrd: :hrd=1:vbv-maxrate=500:vbv-bufsize=500:bitrate=300; recovery: :idr-recovery-sei=1:open-gop=0
""")
_product("hevc", H265, ("mp4", "mkv", "ts"), X265)
_product("hevc", {"default": ""}, ("mov", "hevc", "nut", "avi", "flv", "m2ts"), X265)
_product("hevc", {"hvc1": " -tag:v hvc1", "fragments": " -movflags frag_keyframe+empty_moov"}, ("mp4",), X265)
KVAZAAR = "-c:v libkvazaar -pix_fmt yuv420p -kvazaar-params gop=8,period=16"
_product("hevc", {"kvazaar": KVAZAAR}, ("mp4", "mkv", "ts"), frames=40)
_product("vvc", {"default": "-c:v libvvenc -preset faster -g 16"}, ("mp4", "mkv", "ts", "vvc"), frames=40)

VPX = "-g 20 -deadline realtime -cpu-used 8 -b:v 300k"
VP8 = {"plain": "", "hidden": "-auto-alt-ref 1 -lag-in-frames 16 -deadline good", "robust": "-error-resilient default"}
VP9 = table("""
plain; hidden: -auto-alt-ref 1 -lag-in-frames 16 -deadline good -cpu-used 5;
hidden-6: -auto-alt-ref 6 -lag-in-frames 25 -deadline good -cpu-used 5 -g 60;
robust: -error-resilient 1 -lag-in-frames 0; lossless: -lossless 1; 444: -pix_fmt yuv444p;
ten-bits: -pix_fmt yuv420p10le; keyframes-only: -g 1
""")
_product("vp8", VP8, ("webm", "mkv", "ivf", "avi", "nut", "ogv"), f"-c:v libvpx {VPX}")
_product("vp9", VP9, ("webm", "mp4", "ivf"), f"-c:v libvpx-vp9 {VPX}")
_product("vp9", {"hidden": VP9["hidden"]}, ("mkv", "avi", "mov", "flv", "nut"), f"-c:v libvpx-vp9 {VPX}")
AV1 = table("""
svt: -c:v libsvtav1 -preset 10 -crf 20 -pix_fmt yuv420p -g 20 -svtav1-params lp=1;
svt-low-delay: -c:v libsvtav1 -preset 10 -crf 20 -pix_fmt yuv420p -g 20 -svtav1-params pred-struct=1:lp=1;
svt-open: -c:v libsvtav1 -preset 10 -crf 20 -pix_fmt yuv420p -g 17 -svtav1-params irefresh-type=1:lp=1;
aom: -c:v libaom-av1 -cpu-used 8 -g 20 -lag-in-frames 19;
aom-realtime: -c:v libaom-av1 -usage realtime -cpu-used 8 -g 20;
aom-intra-refresh: -c:v libaom-av1 -cpu-used 8 -g 20 -lag-in-frames 0 -error-resilience 1;
rav1e: -c:v librav1e -speed 10 -g 20
""")
_product("av1", AV1, ("mp4", "mkv", "ivf", "obu"), frames=50)
_product("av1", {"svt": AV1["svt"]}, ("webm", "ts", "avi", "flv", "nut", "avif"), frames=50)

MPEG = table("""
b-frames: -g 12 -bf 2; closed: -g 12 -bf 2 -flags +cgop -sc_threshold 1000000000; no-b-frames: -g 12 -bf 0;
keyframes-only: -g 1; interlaced: -g 12 -bf 2 -flags +ilme+ildct -vf setfield=tff;
strict-b: -g 15 -bf 2 -b_strategy 2 -mpv_flags +strict_gop
""")
_product("mpeg1", {k: MPEG[k] for k in ("b-frames", "closed")}, ("mpg", "ts", "mkv", "mp4", "avi"), "-c:v mpeg1video")
_product("mpeg2", MPEG, ("mpg", "ts", "mkv", "mp4"), "-c:v mpeg2video")
_product(
    "mpeg2",
    {"b-frames": MPEG["b-frames"]},
    ("vob", "mxf", "avi", "mov", "m2v", "nut", "gxf", "dvd", "wtv"),
    "-c:v mpeg2video",
)
_product("mpeg4", MPEG, ("avi", "mp4", "mkv"), "-c:v mpeg4")
_product("mpeg4", {"b-frames": MPEG["b-frames"]}, ("mov", "ts", "m4v", "nut", "3gp", "asf"), "-c:v mpeg4")
_product("mpeg4", {"qpel": "-flags +qpel -bf 2", "partitioned": "-data_partitioning 1"}, ("avi", "mp4"), "-c:v mpeg4")
_product("mpeg4", {"xvid": "-g 12 -bf 2", "xvid-gmc": "-g 12 -bf 2 -gmc 1"}, ("avi", "mkv", "mp4"), "-c:v libxvid")

CODECS = table("""
mjpeg: avi mov mkv mp4 mjpeg asf nut; prores: mov mkv mxf; prores_ks: mov;
dnxhd -profile:v dnxhr_lb -pix_fmt yuv422p: mov mxf mkv; ffv1 -g 1: mkv avi mov nut;
ffv1 -g 12 -level 3 -slices 4: mkv; huffyuv: avi mkv mov; ffvhuff: avi nut; utvideo: avi mov mkv; magicyuv: avi mkv;
gif: gif; apng: apng; libwebp_anim: webp; qtrle: mov mkv; rawvideo: avi mov nut; rawvideo -pix_fmt yuv420p: y4m nut;
rawvideo -allow_raw_vfw 1: mkv; rawvideo -pix_fmt rgb24: avi nut mov; libvpx-vp9 -pix_fmt yuva420p -g 12: webm mkv;
prores_ks -pix_fmt yuva444p10le: mov; png: mov mkv avi nut apng; snow: avi nut mkv; vc2: mov mkv ts drc;
cfhd: mov mkv avi; h263: 3gp avi mov mkv flv h263; h263p: avi mkv; flv: flv avi mkv; flashsv: flv; flashsv2: flv;
wmv1: wmv avi mkv; wmv2: wmv asf avi mkv; msmpeg4: avi asf wmv; msmpeg4v2: avi mkv; cinepak: avi mov; svq1: mov;
rpza: mov; msvideo1: avi; msrle -pix_fmt pal8: avi; zmbv: avi mkv; zlib: avi; roqvideo: roq; rv10: rm mkv;
rv20: rm mkv; asv2: avi; hap: mov; jpeg2000: mov mkv mxf avi; libopenjpeg: mkv; ljpeg: avi mkv; jpegls: avi mkv;
tiff: mov; targa: mov; bmp: avi; speedhq: mkv nut; v210: mov avi; r210: mov; libtheora -g 12 -q:v 7: ogv mkv;
liboapv: mp4 mkv; libjxl: mkv avi; cljr: avi; yuv4: mov; smc -pix_fmt pal8: mov; qoi: mkv; exr: mkv; libxavs2: ts mkv
""")  # encoder and its options: containers
for codec, containers in CODECS.items():
    label = codec.replace(" ", "").replace(":", "-")
    size = (128, 128) if codec == "roqvideo" else SIZE
    _product("codecs", {label: f"-c:v {codec}"}, containers.split(), frames=40, size=size)
for codec, size, container in (
    ("h261", (144, 176), "avi"),
    ("h261", (288, 352), "mkv"),
    ("dvvideo", (576, 720), "mov"),
):
    _add(f"codecs/{codec}-{size[0]}.{container}", encode, f"-c:v {codec}", frames=20, size=size)

# -- times: rates, uneven times, offsets, sound, aspect ratios

RED = "-f lavfi -i color=red:s=64x64:d=0.01"
for container in ("mp4", "mov", "m4v"):
    picture = f"{X264} -bf 2 -c:v:{{0}} png -disposition:v:{{0}} attached_pic"
    _add(f"cover/last.{container}", encode, f"{RED} -map 0:v -map 1:v {picture.format(1)}")
    _add(f"cover/first.{container}", encode, f"{RED} -map 1:v -map 0:v {picture.format(0)}")
CLOCKS = table("30000/1001: 90; 24000/1001: 90; 12.5: 60; 60: 120; 120: 150; 2: 20; 1/2: 12; 1/7: 8; 1000: 90; 15: 60")
for fps, frames in CLOCKS.items():
    for container in ("mp4", "mkv", "ts", "avi", "flv", "mov"):
        _add(f"rates/{fps.replace('/', 'by')}.{container}", encode, f"{X264} -bf 2", frames=int(frames), fps=fps)
    _add(f"rates/{fps.replace('/', 'by')}.webm", encode, f"-c:v libvpx {VPX}", frames=int(frames), fps=fps)
for fps in ("24000/1001", "30", "10"):
    _add(f"rates/{fps.replace('/', 'by')}.mpg", encode, "-c:v mpeg2video -r 25 -bf 2", fps=fps)
    _add(f"rates/{fps.replace('/', 'by')}.gif", encode, "", fps=fps, frames=40)
UNEVEN = table(r"""
growing: (N*N+10*N)/1000/TB; jitter: (N*40+mod(N*7\,13))/1000/TB; gap: (N*40+gte(N\,50)*90000)/1000/TB;
dense-then-sparse: (if(lt(N\,50)\,N*8\,400+(N-50)*500))/1000/TB; ticks: (N*40+mod(N\,2)*39)/1000/TB;
late: (N*40+5000)/1000/TB
""")
OTHER = {"webm": f"-c:v libvpx {VPX}", "mpg": "-c:v mpeg2video -bf 2", "avi": "-c:v mpeg4", "asf": "-c:v wmv2"}
for name, times in UNEVEN.items():
    uneven = f"-vf 'settb=1/1000,setpts={times}' -fps_mode passthrough -enc_time_base 1/1000"
    for container in "mp4 mkv ts flv mov nut avi webm asf".split():
        _add(f"uneven/{name}.{container}", encode, f"{OTHER.get(container, X264)} {uneven}")
SOUND = table(
    "mp4: aac; mkv: libopus; ts: mp2; mov: pcm_s16le; avi: libmp3lame; flv: aac; mpg: mp2; asf: wmav2; nut: aac"
)
for container, sound in SOUND.items():
    codec = OTHER["mpg"] if container == "mpg" else f"{X264} {OPEN264}"
    sine = "-f lavfi -i sine=duration=4 -map 1:a -map 0:v"
    _add(f"sound/first.{container}", encode, f"{sine} {codec} -c:a {sound}", before="-itsoffset 0.7")
for container in ("mp4", "mkv", "ts", "mov", "flv", "nut", "webm", "mpg", "asf"):
    for offset in ("0.013", "-0.5", "7.77", "1700000000", "95440"):
        _add(f"offset/{offset}.{container}", encode, f"{OTHER.get(container, X264)} -output_ts_offset {offset}")
for aspect in ("4/3", "16/11", "1/2", "10/1", "999/1000"):
    for container in "mp4 mkv ts avi mpg webm mov".split():
        codec = {**OTHER, "webm": f"-c:v libvpx-vp9 {VPX}", "mov": "-c:v prores"}.get(container, X264)
        _add(f"aspect/{aspect.replace('/', 'to')}.{container}", encode, f"{codec} -vf setsar={aspect}", frames=40)
for size in ((98, 130), (95, 127), (16, 16), (1080, 64), (64, 1000)):
    _add(f"size/{size[0]}.mp4", encode, "-c:v libx264 -pix_fmt yuv444p", size=size, frames=30)
    _add(f"size/{size[0]}.mkv", encode, "-c:v ffv1", size=size, frames=30)

# -- cut without encoding again

CUTS = table("""
fast: -ss 1.1,; fast-end: -ss 1.1 -t 1.7,; slow: , -ss 1.1; end: , -t 2.2; slow-anywhere: , -ss 1.1 -copyinkf;
zero: -ss 1.1, -avoid_negative_ts make_zero; negative: -ss 1.1, -avoid_negative_ts disabled;
epoch: -ss 1.1 -copyts, -output_ts_offset 1700000000;
below-zero: -ss 1.1 -copyts, -output_ts_offset -2.5 -avoid_negative_ts disabled
""")  # options before the input, options after it
CUT_SOURCES = table("""
h264/open.mkv: mp4 mkv ts mov flv; h264/closed-pyramid.mp4: mp4 mkv ts mov flv; h264/open.ts: mp4 ts mkv;
h264/intra-refresh-b.ts: ts mkv mp4; h264/fragments.mp4: mp4; hevc/default.mp4: mp4 mkv ts; hevc/leading.mp4: mp4 ts;
mpeg2/b-frames.ts: mpg ts mkv mp4; mpeg4/b-frames.mkv: mp4 mkv avi; vp9/hidden.webm: webm mp4;
av1/svt-open.mkv: mkv mp4; codecs/wmv2.wmv: wmv; codecs/libtheora-g12-q-v7.ogv: ogv
""")
for source, containers in CUT_SOURCES.items():
    for container, (name, options) in itertools.product(containers.split(), CUTS.items()):
        _add(f"cut/{source.replace('/', '-')}-{name}.{container}", remux, source, *options.split(","))

# -- joined without encoding again; the second part shows the numbers from 200 on

SECOND = FIRST + 200
PARTS = {
    "open": f"{X264} {OPEN264}",
    "closed": f"{X264} -bf 5",
    "plain": f"{X264} -bf 0 -preset ultrafast",
    "hevc": X265,
}
PARTS |= {"vp9": f"-c:v libvpx-vp9 {VPX} {VP9['hidden']}", "av1": AV1["svt"], "theora": "-c:v libtheora -g 12 -q:v 7"}
PARTS |= {codec: f"-c:v {codec} -g 12 -bf 2" for codec in ("mpeg2video", "mpeg4")}
JOINS = table("""
open: ts mp4 mkv flv, ts mp4 mkv mov; closed: ts mp4 mkv, ts mp4 mkv; plain: ts mp4 flv, ts mp4 flv;
hevc: ts mp4, ts mp4 mkv; mpeg2video: ts mpg, ts mpg mkv; mpeg4: avi mp4, avi mkv; vp9: webm ivf, webm mp4;
av1: mp4 obu mkv, mp4 mkv; theora: ogv, ogv
""")  # containers of the parts, containers of the whole
for name, containers in JOINS.items():
    parts, wholes = containers.split(", ")
    for container in parts.split():
        _add(f"parts/{name}-1.{container}", encode, PARTS[name], frames=50)
        _add(f"parts/{name}-2.{container}", encode, PARTS[name], frames=40, first=SECOND)
        both = [f"parts/{name}-1.{container}", f"parts/{name}-2.{container}"]
        _add(f"appended/{name}.{container}", append, both)
        for whole in wholes.split():
            _add(f"joined/{name}-{container}.{whole}", join, [*both, both[0]])
for name, container in (
    ("open", "h264"),
    ("closed", "h264"),
    ("hevc", "hevc"),
    ("mpeg2video", "m2v"),
    ("mpeg4", "m4v"),
):
    raw = [f"raw/{name}-{part}.{container}" for part in (1, 2)]
    _add(raw[0], encode, PARTS[name], frames=50)
    _add(raw[1], encode, PARTS[name], frames=40, first=SECOND)
    _add(f"appended/raw-{name}.{container}", append, raw)
_add("parts/wide.ts", encode, PARTS["plain"], frames=40, first=SECOND, size=(64, 160))
_add("parts/wide.mp4", encode, PARTS["plain"], frames=40, first=SECOND, size=(64, 160))
_add("parts/fast.ts", encode, PARTS["plain"], frames=40, first=SECOND, fps="60000/1001")
_add("parts/fast.mp4", encode, PARTS["plain"], frames=40, first=SECOND, fps="60000/1001")
_add("parts/late.ts", encode, f"{PARTS['open']} -output_ts_offset 5000", frames=40, first=SECOND)
_add("parts/cut.ts", remux, "parts/open-2.ts", "-ss 0.7")
MIXED = table("""
size: plain-1 wide; rate: plain-1 fast; groups: open-1 plain-2; groups-back: plain-1 open-2; later: open-1 late;
earlier: late open-1; cut: open-1 cut; cut-first: cut open-1; codec: open-1 hevc-2; codec-2: mpeg2video-1 open-2
""")
for name, parts in MIXED.items():
    for container in ("ts", "mp4"):
        both = [f"parts/{part}.{container}" for part in parts.split()]
        if not all(part in RECIPES for part in both):
            continue
        if container == "ts":
            _add(f"appended/mixed-{name}.ts", append, both)
        for whole in ("ts", "mp4", "mkv"):
            _add(f"joined/mixed-{name}-{container}.{whole}", join, both)
_add("appended/open-wide-open.ts", append, ["parts/plain-1.ts", "parts/wide.ts", "parts/plain-2.ts"])

# -- times rewritten, packets filtered, dropped or damaged

FILTERS = {
    "h264/open.mp4 h264/closed-pyramid.mkv h264/no-b-frames.mp4 hevc/default.mkv": table(r"""
        equal: setts=pts=floor(PTS/4800)*4800*gte(TB\,0):dts=DTS;
        equal-ms: setts=pts=if(mod(N\,7)\,PTS\,PTS+40*gt(TB\,0));
        backwards: setts=pts=if(gte(N\,50)\,PTS-1/TB\,PTS):dts=if(gte(N\,50)\,DTS-1/TB\,DTS);
        one-backwards: setts=pts=if(eq(N\,50)\,PTS-2/TB\,PTS); restart: setts=pts=if(gte(N\,50)\,PTS-2/TB\,PTS);
        jump: setts=pts=if(gte(N\,50)\,PTS+3000/TB\,PTS):dts=if(gte(N\,50)\,DTS+3000/TB\,DTS);
        dts-only: setts=pts=DTS; no-pts: setts=pts=NOPTS; some-no-pts: setts=pts=if(mod(N\,5)\,PTS\,NOPTS);
        jitter: setts=pts=PTS+mod(N*7\,3)*0.004/TB; slow: setts=pts=PTS*3:dts=DTS*3:duration=DURATION*3;
        no-duration: setts=duration=0; drop-some: noise=drop=eq(mod(n\,17)\,9); drop-keys: noise=drop=key*gt(n\,0);
        drop-first: noise=drop=lt(n\,1); drop-ten: noise=drop=lt(n\,10); drop-not-keys: noise=drop=not(key);
        drop-last: noise=drop=gt(n\,96); damage: noise=amount=if(eq(mod(n\,31)\,20)\,30\,0);
        damage-keys: noise=amount=if(key*gt(n\,0)\,30\,0); headers-inside: dump_extra=freq=all;
        no-headers: remove_extra=freq=all
    """),
    "h264/open.mp4 h264/closed-pyramid.mkv h264/intra-refresh-b.ts h264/interlaced.ts": table("""
        no-sei: filter_units=remove_types=6; no-idr: filter_units=remove_types=5; no-aud: filter_units=remove_types=9;
        no-slices: filter_units=remove_types=1; only-not-idr: filter_units=pass_types=1|5|7|8;
        aud: h264_metadata=aud=insert; rate: h264_metadata=tick_rate=30;
        turned: h264_metadata=display_orientation=insert:rotate=90;
        flipped: h264_metadata=display_orientation=insert:flip=horizontal;
        cropped: h264_metadata=crop_left=16:crop_top=8; aspect: h264_metadata=sample_aspect_ratio=2/1
    """),
    "hevc/default.mp4 hevc/leading.mkv hevc/interlaced.ts": table("""
        no-idr: filter_units=remove_types=19|20; no-cra: filter_units=remove_types=21;
        no-rasl: filter_units=remove_types=8|9; no-sei: filter_units=remove_types=39|40;
        aud: hevc_metadata=aud=insert; rate: hevc_metadata=tick_rate=30;
        cropped: hevc_metadata=crop_left=16:crop_top=8; aspect: hevc_metadata=sample_aspect_ratio=2/1
    """),
    "vp9/hidden.webm vp9/hidden-6.webm vp9/hidden.mp4": table(r"""
        split: vp9_superframe_split; split-joined: vp9_superframe_split,vp9_superframe;
        reordered: vp9_superframe_split,vp9_raw_reorder; drop: noise=drop=eq(mod(n\,17)\,9);
        drop-first: noise=drop=lt(n\,3)
    """),
    "av1/aom.mkv av1/svt.mp4": table(r"""
        split: av1_frame_split; split-merged: av1_frame_split,av1_frame_merge; delimiters: av1_metadata=td=insert;
        drop: noise=drop=eq(mod(n\,17)\,9)
    """),
    "mpeg4/b-frames.avi mpeg4/xvid.avi": {"unpacked": "mpeg4_unpack_bframes", "drop": "noise=drop=eq(mod(n\\,17)\\,9)"},
    "mpeg2/b-frames.mpg mpeg2/b-frames.ts": table(r"""
        rate: mpeg2_metadata=frame_rate=30; aspect: mpeg2_metadata=display_aspect_ratio=16/9;
        drop: noise=drop=eq(mod(n\,17)\,9); drop-first: noise=drop=lt(n\,2)
    """),
}
for sources, filters in FILTERS.items():
    for source, (name, bsf) in itertools.product(sources.split(), filters.items()):
        stem, container = source.replace("/", "-").split(".")
        for target in dict.fromkeys([container, "mkv" if "264" in source or "hevc" in source else container]):
            _add(f"filtered/{stem}-{container}-{name}.{target}", remux, source, "", f"-bsf:v '{bsf}'")

# -- parts of containers renamed, dropped or rewritten


QUARTERS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
TURNS = QUARTERS + [(-a, b, -c, d) for a, b, c, d in QUARTERS]
NONSENSE = [(0, 0, 0, 0), (0.7071, 0.7071, -0.7071, 0.7071), (2, 0, 0, 2), (2, 0, 0, 1), (1, 0.5, 0, 1), (0, 1, 0, 0)]
MP4_PATCHES = {
    f"renamed-{k}": rename(k)
    for k in "stss ctts elst edts sdtp sgpd sbgp pasp colr btrt avcC hvcC tkhd mdhd hdlr udta".split()
}
MP4_PATCHES |= {f"turn-{i}": matrix(*turn) for i, turn in enumerate(TURNS)}
MP4_PATCHES |= {f"nonsense-{i}": matrix(*turn) for i, turn in enumerate(NONSENSE)}
MP4_PATCHES |= {
    "pasp-0": put("pasp", 0, "II", 0, 0),
    "pasp-wide": put("pasp", 0, "II", 16, 11),
    "pasp-thin": put("pasp", 0, "II", 1, 3),
    "pasp-mad": put("pasp", 0, "II", 1, 100000),
    "edit-later": put("elst", 12, "i", 20000),
    "edit-early": put("elst", 12, "i", 0),
    "edit-short": put("elst", 8, "I", 1500),
    "edit-middle": put("elst", 8, "Ii", 1500, 15000),
    "edit-odd": put("elst", 8, "Ii", 1333, 7777),
    "edit-none": put("elst", 8, "I", 0),
    "edit-empty": put("elst", 12, "i", -1),
    "edit-past": put("elst", 12, "i", 10_000_000),
    "edit-slow": put("elst", 16, "I", 1 << 15),
    "edit-still": put("elst", 16, "I", 0),
    "stts-long": put("stts", 12, "I", 5000),
    "stts-0": put("stts", 12, "I", 0),
    "stts-huge": put("stts", 12, "I", 0x7FFFFFFF),
    "stts-few": put("stts", 8, "I", 60),
    "stss-late": put("stss", 8, "I", 13),
    "stss-none": put("stss", 4, "I", 0),
    "stss-wrong": put("stss", 8, "III", 5, 17, 30),
    "timescale": put("mdhd", 12, "I", 90000),
    "timescale-1": put("mdhd", 12, "I", 1),
    "movie-timescale": put("mvhd", 12, "I", 600),
    "duration": put("mdhd", 16, "I", 20000),
    "track-duration": put("tkhd", 20, "I", 700),
    "track-off": put("tkhd", 0, "I", 0),
    "track-size": put("tkhd", 76, "II", 200 << 16, 100 << 16),
    "ctts-0": ctts(lambda i, offset: 0),
    "ctts-negative": ctts(lambda i, offset: offset - 3000),
    "ctts-huge": ctts(lambda i, offset: offset + (i % 9 == 5) * 90_000_000),
    "ctts-mixed": ctts(lambda i, offset: offset + 512 * (i % 3)),
    "avc3": swap(b"avc1", b"avc3"),
}
_add(
    "boxes/source.mp4",
    encode,
    f"{X264} {OPEN264} -vf setsar=4/3,setparams=color_primaries=bt709:colorspace=bt709:color_trc=bt709",
)
_add("boxes/hevc.mp4", encode, f"{X265} -vf setsar=4/3")
_add("boxes/square.mov", encode, f"{X264} -bf 4")
_add("boxes/delayed.mp4", encode, f"{X264} -bf 2 -output_ts_offset 1.3")
for source in ("boxes/source.mp4", "boxes/hevc.mp4", "boxes/square.mov"):
    for name, change in MP4_PATCHES.items():
        stem, container = source.split("/")[1].split(".")
        _add(f"boxes/{stem}-{name}.{container}", patch, source, change)
for name in ("renamed-elst", "renamed-edts", "edit-later", "edit-short", "edit-none", "turn-1"):
    _add(f"boxes/delayed-{name}.mp4", patch, "boxes/delayed.mp4", MP4_PATCHES[name])
for kind in ("tfdt", "trun", "tfhd", "mfra", "sidx", "mehd", "mvex"):
    _add(f"boxes/fragments-{kind}.mp4", patch, "h264/fragments.mp4", swap(kind.encode(), b"free"))

MKV_PATCHES = {
    "cues": void("1C53BB6B"),
    "seek-head": void("114D9B74"),
    "tags": void("1254C367"),
    "info-duration": void("4489"),
    "default-duration": void("23E383"),
    "wrong-default-duration": ebml("23E383", 10_000_000),
    "codec-delay": void("56AA"),
    "codec-private": void("63A2"),
    "lacing": void("9C"),
    "display-width": void("54B0"),
    "wide": ebml("54B0", 200),
    "scale": ebml("2AD7B1", 3_000_000),
    "scale-fine": ebml("2AD7B1", 100_000),
    "no-keys": blocks(lambda i, time, flags: (time, flags & ~0x80)),
    "all-keys": blocks(lambda i, time, flags: (time, flags | 0x80)),
    "invisible": blocks(lambda i, time, flags: (time, flags | 0x08 * (i % 5 == 2))),
    "discardable": blocks(lambda i, time, flags: (time, flags | 0x01)),
    "equal-times": blocks(lambda i, time, flags: (time - 40 * (i % 9 == 4), flags)),
    "jitter": blocks(lambda i, time, flags: (time + i * 7 % 11, flags)),
    "one-backwards": blocks(lambda i, time, flags: (time - 900 * (i == 40), flags)),
    "cluster-time": ebml("E7", 0),
}
SOURCES = "h264/open.mkv hevc/leading.mkv vp9/hidden.webm mpeg4/b-frames.mkv av1/svt.mkv aspect/4to3.mkv"
for source in SOURCES.split():
    for name, change in MKV_PATCHES.items():
        stem, container = source.replace("/", "-").split(".")
        _add(f"elements/{stem}-{name}.{container}", patch, source, change)


def _drop_packet(index, packet):
    if index % 29 == 20:
        packet.clear()


TS_PATCHES = {
    "no-random-access": ts_flag(0x40, False),
    "all-random-access": ts_flag(0x40, True),
    "discontinuity": ts_flag(0x80, True),
    "no-clock": ts_flag(0x10, False),
    "lost-packets": ts_packets(_drop_packet),
    "lost-start": lambda data: data.__delitem__(slice(0, 188 * 9)),
    "lost-bytes": lambda data: data.__delitem__(slice(5000, 5100)),
    "no-program": ts_packets(
        lambda i, packet: packet.__setitem__(1, packet[1] | 0x1F) if packet[1] & 0x1F == 0 == packet[2] else None
    ),
}
for source, (name, change) in itertools.product(
    ("h264/open.ts", "hevc/default.ts", "mpeg2/b-frames.ts"), TS_PATCHES.items()
):
    _add(f"packets/{source.split('/')[0]}-{name}.ts", patch, source, change)
AVI_PATCHES = {
    "no-index": swap(b"idx1", b"JUNK"),
    "no-keys": avi_index(lambda i, flags: 0),
    "all-keys": avi_index(lambda i, flags: 0x10),
    "codec": swap(b"FMP4", b"XVID"),
}
for source, (name, change) in itertools.product(
    ("h264/open.avi", "mpeg4/b-frames.avi", "codecs/mjpeg.avi"), AVI_PATCHES.items()
):
    _add(f"packets/{source.replace('/', '-')[:-4]}-{name}.avi", patch, source, change)
FLV_PATCHES = {
    "no-metadata": swap(b"onMetaData", b"onMetaDaty"),
    "no-keys": flv_tags(lambda i, time, first: (time, first & 0x8F | 0x20 if i else first)),
    "all-keys": flv_tags(lambda i, time, first: (time, first & 0x8F | 0x10)),
    "restart": flv_tags(lambda i, time, first: (time - 1500 * (i > 50), first)),
    "equal": flv_tags(lambda i, time, first: (time // 80 * 80, first)),
}
for source, (name, change) in itertools.product(
    ("h264/open.flv", "h264/plain.flv", "codecs/flv.flv"), FLV_PATCHES.items()
):
    _add(f"packets/{source.replace('/', '-')[:-4]}-{name}.flv", patch, source, change)
for name, settings in table("""
turned: -display_rotation 90; odd: -display_rotation 30; flipped: -display_hflip;
both: -display_rotation -90 -display_vflip
""").items():
    for container in ("mp4", "mov", "mkv"):
        _add(f"turned/{name}.{container}", remux, "h264/open.mp4", settings)
