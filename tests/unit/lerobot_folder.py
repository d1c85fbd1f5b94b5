"""LeRobot datasets as a test writes them: two episodes of two tasks, in the layout of version 2.1 or 3.0."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from reachrl.report.video import write_video

FPS = 10
SIZE = 32
NAMES = {"motors": ["x", "y", "z", "axis_angle1", "axis_angle2", "axis_angle3", "gripper", "gripper"]}


def pictures(count, seed=0):
    """Frames whose grey level tells them apart, also after lossy coding: u8[count 32 32 3]."""
    levels = 30 + (seed * 47 + np.arange(count) * 21) % 200
    return np.broadcast_to(levels[:, None, None, None], (count, SIZE, SIZE, 3)).astype(np.uint8)


def fingers(count):
    """Finger joints of a gripper that closes: f64[count 2]."""
    half = np.linspace(0.04, 0.0, count)
    return np.column_stack([half, -half])


def png(frame, *, orientation=1):
    """A picture as LeRobot stores it in a row; `orientation` is the EXIF tag."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(frame).save(buffer, "PNG", exif=exif)
    return {"bytes": buffer.getvalue(), "path": None}


class LeRobotFolder:
    """The dataset and what was written into it; `kind` says whether frames lie in videos or as images in rows."""

    def __init__(self, root, version, kind, *, names=NAMES, state="observation.state", success=None, lengths=(6, 9)):
        self.root, self.version, self.kind, self.lengths, self.success = root, version, kind, lengths, success
        self.camera, self.state = "observation.images.front", state
        self.tasks = ["open the drawer", "close the drawer"]
        rng = np.random.default_rng(0)
        self.images = [pictures(length, seed) for seed, length in enumerate(lengths)]
        self.states = [np.column_stack([rng.normal(size=(n, 6)), fingers(n)]).astype(np.float32) for n in lengths]
        self.actions = [rng.normal(size=(n, 7)).astype(np.float32) for n in lengths]
        picture = {"dtype": kind, "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channel"]}
        depth = picture | {"info": {"video.is_depth_map": True}}
        self.info = {
            "codebase_version": {2: "v2.1", 3: "v3.0"}[version],
            "fps": FPS,
            "chunks_size": 1000,
            "total_episodes": len(lengths),
            "features": {
                "observation.images.depth": depth,
                self.camera: picture,
                state: {"dtype": "float32", "shape": [8], "names": names},
                "action": {"dtype": "float32", "shape": [7], "names": None},
            },
        }
        if version == 2:
            self.info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
            self.info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        else:
            self.info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
            self.info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        self.write_meta()
        (self.write_data_2 if version == 2 else self.write_data_3)()

    def rows(self, number):
        length = self.lengths[number]
        columns = {
            self.state: list(self.states[number]),
            "action": list(self.actions[number]),
            "timestamp": np.arange(length, dtype=np.float32) / FPS,
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "task_index": np.full(length, number),
        }
        if self.success is not None:
            columns["next.success"] = np.arange(length) == (length - 1 if self.success[number] else length)
        if self.kind == "image":
            columns[self.camera] = [png(frame) for frame in self.images[number]]
        return pa.table(columns)

    def write_meta(self):
        meta = self.root / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        (meta / "info.json").write_text(json.dumps(self.info))
        if self.version == 2:
            (meta / "tasks.jsonl").write_text(
                "".join(json.dumps({"task_index": i, "task": task}) + "\n" for i, task in enumerate(self.tasks))
            )
            (meta / "episodes.jsonl").write_text(
                "".join(
                    json.dumps({"episode_index": i, "tasks": [self.tasks[i]], "length": length}) + "\n"
                    for i, length in enumerate(self.lengths)
                )
            )
            return
        pq.write_table(pa.table({"task_index": [0, 1], "__index_level_0__": self.tasks}), meta / "tasks.parquet")
        (meta / "episodes/chunk-000").mkdir(parents=True)
        columns = {
            "episode_index": [0, 1],
            "tasks": [[task] for task in self.tasks],
            "length": list(self.lengths),
            "data/chunk_index": [0, 0],
            "data/file_index": [0, 0],
            "stats/action/min": [[0.0], [0.0]],
        }
        if self.kind == "video":
            columns |= {
                f"videos/{self.camera}/chunk_index": [0, 0],
                f"videos/{self.camera}/file_index": [0, 0],
                f"videos/{self.camera}/from_timestamp": [0.0, self.lengths[0] / FPS],
                f"videos/{self.camera}/to_timestamp": [self.lengths[0] / FPS, sum(self.lengths) / FPS],
            }
        pq.write_table(pa.table(columns), meta / "episodes/chunk-000/file-000.parquet")

    def write_data_2(self):
        (self.root / "data/chunk-000").mkdir(parents=True)
        for number, images in enumerate(self.images):
            pq.write_table(self.rows(number), self.root / f"data/chunk-000/episode_{number:06d}.parquet")
            if self.kind == "video":
                path = self.root / f"videos/chunk-000/{self.camera}/episode_{number:06d}.mp4"
                write_video(path, images, fps=FPS, hold_last_s=0)

    def write_data_3(self):
        (self.root / "data/chunk-000").mkdir(parents=True)
        both = pa.concat_tables([self.rows(0), self.rows(1)])
        pq.write_table(both, self.root / "data/chunk-000/file-000.parquet", row_group_size=4)
        if self.kind == "video":
            path = self.root / f"videos/{self.camera}/chunk-000/file-000.mp4"
            write_video(path, np.concatenate(self.images), fps=FPS, hold_last_s=0)
