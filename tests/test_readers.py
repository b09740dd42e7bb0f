"""Each data set is read from its official layout, with what is odd about real copies of it."""

import json
import subprocess
import sys
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from examples import look
from files.decode import DataError
from model import preset
from sources import DATASETS, manifest, open_data, paper

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import paper as tables  # noqa: E402

ID = ["--abcdefghi", "Yabcdefghij", "_kl-mnopqrs", "tuvwxyz0123"]  # YouTube ids, one of which opens with a Y


def write(root, files):
    """Files by name: text or bytes as they are, arrays as pictures, numbers as seconds of a rising ramp."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (str, bytes)):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        elif isinstance(content, np.ndarray):
            Image.fromarray(content).save(path)
        else:
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1), file.setsampwidth(2), file.setframerate(1000)
                file.writeframes(np.arange(int(content * 1000), dtype="<i2").tobytes())
    return root


def rows(source):
    return [source.row(i) for i in range(len(source))]


def audioset(root):
    head = ("# Segments csv created Sun Mar  5 10:54:31 2017\n# num_ytids=4\n"
            "# YTID, start_seconds, end_seconds, positive_labels\n")
    lines = [f'{i}, {30 * n}.000, {30 * n + 10}.000, "/m/b,/m/a"\n' for n, i in enumerate(ID)]
    return write(root, {
        "eval_segments.csv": head + "".join(lines),
        "balanced_train_segments.csv": head + f'{ID[0]}, 0.000, 10.000, "/m/a"\n',
        "class_labels_indices.csv":
            'index,mid,display_name\n0,/m/a,"Male speech, man speaking"\n1,/m/b,Dog\n2,/m/c,Cat\n',
        f"eval/{ID[0]}_0.WAV": 1, f"eval/Y{ID[1]}.wav": 1, f"video/{ID[2]}.mp4": b""})


def test_audioset_has_several_labels_odd_names_and_clips_that_are_gone(tmp_path):
    source = open_data(f"audioset:{audioset(tmp_path)}", "test")
    sounds = [row["audio"] for row in rows(source)]
    assert sounds == [f"eval/{ID[0]}_0.WAV", f"eval/Y{ID[1]}.wav", f"video/{ID[2]}.mp4"]
    assert source.absent == 1 and source.columns == ["audio", "video"] and source.multi_label
    assert source.classes == ["Male speech, man speaking", "Dog", "Cat"] and source.labels(1) == [1, 0]
    assert len(open_data(f"audioset:{tmp_path}", "train")) == 1


def test_esc50_has_folds_and_spaces_in_its_classes(tmp_path):
    write(tmp_path, {"meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n"
                                       "1-1-A-0.wav,1,5,vacuum_cleaner,False,1,A\n"
                                       "2-1-A-0.wav,2,0,dog,True,1,A\n3-1-A-0.wav,3,7,rooster,False,1,A\n",
                     "audio/1-1-A-0.WAV": 1, "audio/2-1-A-0.wav": 1})
    source = open_data(f"esc50:{tmp_path}", "test")
    assert source.classes == ["dog", "rooster", "vacuum cleaner"]  # of all that is listed, absent or not
    assert [source.label(0), source.label(1), source.absent] == [2, 0, 1] and source.row(1)["fold"] == "2"
    assert source.read(0, "audio").shape == (1, 16000)


def test_vggsound_names_hold_the_start(tmp_path):
    write(tmp_path, {"vggsound.csv": f'{ID[0]},30,"people eating, chewing",test\n'
                                     f"{ID[0]},130,dog barking,test\n{ID[1]},5,sea,train\n",
                     f"video/{ID[0]}_000030.mp4": b"", f"video/{ID[1]}_000005.MP4": b""})
    source = open_data(f"vggsound:{tmp_path}", "test")
    assert [row["video"] for row in rows(source)] == [f"video/{ID[0]}_000030.mp4"] and source.absent == 1
    assert source.classes == ["dog barking", "people eating, chewing", "sea"] and source.label(0) == 1


def test_captions_keep_their_quotes_and_share_their_sound(tmp_path):
    lines = ("file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
             'A #1 (x).wav,"A man, a dog, ""woof""",b,c,d,e\ngone.wav,a,b,c,d,e\nB.wav,p,q,r,s,t\n')
    write(tmp_path / "c", {"clotho_captions_evaluation.csv": lines,
                           "evaluation/A #1 (x).WAV": 1, "evaluation/B.wav": 1})
    source = open_data(f"clotho:{tmp_path / 'c'}", "test")
    assert source.read(0, "text") == 'A man, a dog, "woof"' and len(source) == 10
    assert source.items("audio")[1].tolist() == [0] * 5 + [5] * 5
    write(tmp_path / "a", {"test.csv": "audiocap_id,youtube_id,start_time,caption\n"
                                       f'1,{ID[0]},3,"x, y"\n2,{ID[0]},3,z\n7,{ID[1]},0,w\n',
                           f"{ID[0]}.wav": 20, "7.wav": 10})
    source = open_data(f"audiocaps:{tmp_path / 'a'}", "test")
    assert source.items("audio")[1].tolist() == [0, 0, 2] and source.read(0, "text") == "x, y"
    # one file is a whole recording, the other the clip
    whole, clip = source.read(0, "audio"), source.read(2, "audio")
    assert whole.shape == clip.shape == (1, 160000)
    assert abs(float(whole[0, 80000]) * 32768 - 8000) < 20 and abs(float(clip[0, 80000]) * 32768 - 5000) < 20


def scene(folder, label, millimetres=1500, focal_length="529.5 0 365\n0 529.5 265\n0 0 1"):
    raw = np.full((4, 6), millimetres, np.uint16)
    return {f"{folder}/image/a.JPG": np.zeros((4, 6, 3), np.uint8),
            f"{folder}/depth_bfx/a.png": (raw << 3) | (raw >> 13),
            f"{folder}/intrinsics.txt": focal_length, f"{folder}/scene.txt": label + "\n"}


def sun(root):
    for n, label in enumerate(("home_office", "playroom", "kitchen"), 1):
        write(root, scene(f"kv1/NYUdata/NYU000{n}", label))
    write(root, scene("kv2/a/b-resize", "lab"))
    write(root, scene("xtion/sun3ddata/x/y", "office", 9500))
    write(root, scene("realsense/lg/z", "gym"))
    (root / "kv1/NYUdata/NYU0003/scene.txt").unlink()  # a scene without its annotation
    return root


def test_sunrgbd_turns_bits_and_knows_its_sensors(tmp_path):
    write(sun(tmp_path), {"test.txt": "SUNRGBD/kv1/NYUdata/NYU0001/\nxtion/sun3ddata/x/y\n"
                                      "realsense/lg/z\nkv1/NYUdata/NYU0003\n"})
    source = open_data(f"sunrgbd:{tmp_path}", "test")
    assert [row["label"] for row in rows(source)] == ["home_office", "office"]  # a gym is none of the 19
    assert source.absent == 1 and len(source.classes) == 19
    assert source.classes[source.label(0)] == "home office"
    assert np.allclose(source.read(0, "depth"), 0.075 * 529.5 / (8 * 1.5) / 75, rtol=1e-5)
    stored = ((9500 << 3) | (9500 >> 13)) % 2**16 / 1000  # the authors' metres: bits that fell off are lost
    assert np.allclose(source.read(1, "depth"), 0.095 * 529.5 / stored / 75, rtol=1e-5)
    assert [row["label"] for row in rows(open_data(f"sunrgbd:{tmp_path}", "train"))] == ["playroom", "lab"]


def test_nyud_has_others_and_the_official_split_is_read(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    place = "/n/fs/sun3d/data/SUNRGBD/"
    folder = sun(tmp_path) / "SUNRGBDtoolbox" / "traintestSUNRGBD"
    folder.mkdir(parents=True)
    test = [place + f"kv1/NYUdata/NYU000{n}/" for n in (1, 2)]
    cells = {"alltrain": np.array([place + "kv2/a/b-resize"], object), "alltest": np.array(test, object)}
    savemat(folder / "allsplit.mat", cells, do_compression=True)
    source = open_data(f"nyud:{tmp_path}", "test")
    assert [row["label"] for row in rows(source)] == ["home_office", "others"] and len(source.classes) == 10
    assert len(source.classes[-1].split("|")) == 18 and "playroom" in source.classes[-1].split("|")
    monkeypatch.setitem(sys.modules, "scipy.io", None)  # as if it were not installed
    paper.open_dataset.cache_clear()
    with pytest.raises(DataError, match="^nyud:.*pip install scipy.*test.txt"):
        open_data(f"nyud:{tmp_path}", "test")


def test_llvip_crops_people_and_as_much_without_them(tmp_path):
    boxes = [(10, 20, 30, 80), (60, 5, 80, 70)]
    note = "<annotation><size><width>120</width><height>100</height></size>" + "".join(
        f"<object><name>person</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>" for a, b, c, d in boxes) + "</annotation>"
    people = np.zeros((100, 120), np.uint8)
    for x0, y0, x1, y1 in boxes:
        people[y0:y1, x0:x1] = 255
    write(tmp_path, {"Annotations/1.xml": note})
    for name in ("test/1", "test/2", "train/3"):
        write(tmp_path, {f"visible/{name}.jpg": people, f"infrared/{name}.png": people})
    source = open_data(f"llvip:{tmp_path}", "test")
    crops = [source.read(i, "thermal") for i in range(len(source))]
    names = [source.classes[source.label(i)].split("|")[0] for i in range(len(source))]
    assert names == ["person", "street"] * 2 and source.classes[0] == "person|man|woman|people"
    assert [crop.mean() for crop in crops] == [1, 0, 1, 0]
    assert [crop.shape for crop in crops] == [(60, 20)] * 2 + [(65, 20)] * 2
    assert source.read(0, "image").shape == (60, 20, 3) and source.absent == 1  # the second has no annotation
    assert source.content == open_data(f"llvip:{tmp_path}", "test").content  # the same boxes every time
    assert open_data(f"llvip:{tmp_path}", "train").read(0, "thermal").shape == (100, 120)
    crowd = note.replace("<xmin>10", "<xmin>0").replace("<xmax>30", "<xmax>110")  # leaves no room elsewhere
    write(tmp_path, {"Annotations/1.xml": crowd})
    paper.open_dataset.cache_clear()
    source = open_data(f"llvip:{tmp_path}", "test")
    assert [source.label(i) for i in range(len(source))] == [0, 0]  # the people are kept


def test_ego4d_windows_are_found_by_time(tmp_path):
    uid = next(f"uid{i}" for i in range(20) if zlib.crc32(f"uid{i}".encode()) % 5 == 0)
    names = ("component_idx,component_timestamp_ms,canonical_timestamp_ms,"
             "gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z\n")
    lines = [f"0,{t},{t},{t},1,2,{t / 1000},4,{'' if t == 5000 else 5}\n" for t in np.arange(-13, 16000, 5.0)]
    told = {"timestamp_sec": 7.5, "narration_text": '#C C cuts, "x"'}
    too_early, too_late = ({"timestamp_sec": t, "narration_text": "x"} for t in (1.0, 14.0))
    videos = [{"video_uid": uid, "scenarios": ["Cooking"], "duration_sec": 16},
              {"video_uid": "gone", "scenarios": ["Gardening"], "duration_sec": 60},
              {"video_uid": "many", "scenarios": ["Cooking", "Eating"], "duration_sec": 60},
              {"video_uid": "none"}]
    write(tmp_path, {f"imu/{uid}.csv": names + "".join(lines), "ego4d.json": json.dumps({"videos": videos})})
    source = open_data(f"ego4d:{tmp_path}", "test")  # without narrations the windows follow each other
    assert [row["start"] for row in rows(source)] == ["0.0", "5.0", "10.0"]
    assert source.classes == ["Cooking", "Gardening"] and source.label(2) == 0
    imu = source.read(1, "imu")  # accelerometer, then gyroscope
    assert imu.shape == (6, 1000) and np.isclose(imu[0, 0], 5.002) and np.isclose(imu[3, -1], 9997)
    assert data.transform("imu", imu, preset("huge", "imu")).shape == (6, 2000)
    # Of either version's file they are centred on narrations that the recording has room around.
    notes = [too_early, told, too_late]
    second = [{"time": note["timestamp_sec"], "text": note["narration_text"]} for note in notes]
    for name, content in (("narration.json", {uid: {"narration_pass_1": {"narrations": notes}}}),
                          ("all_narrations_redacted.json", {"videos": {uid: {"narrations": second}}})):
        write(tmp_path, {name: json.dumps(content)})
        paper.open_dataset.cache_clear()
        source = open_data(f"ego4d:{tmp_path}", "test")
        assert [row["start"] for row in rows(source)] == ["5.0"]
        assert source.read(0, "text") == '#C C cuts, "x"'
        (tmp_path / name).unlink()


def ego4d_table(times):
    names = "canonical_timestamp_ms,gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z\n"
    return names + "".join(f"{t},1,2,3,{'' if t == '' else t / 1000},5,6\n" for t in times)


def test_an_imu_window_is_sorted_and_one_that_is_not_covered_is_refused(tmp_path):
    times = list(np.arange(0, 30_000, 5.0))
    swapped = times[:1000] + times[2000:3000] + times[1000:2000] + times[3000:]
    with_gap = [t for t in times if not 7000 <= t < 10_000]
    without_some_times = [*times[:1100], "", "", *times[1100:]]
    tables_of = {"whole": times, "swapped": swapped, "empty": without_some_times, "gap": with_gap}
    for name, kept in tables_of.items():
        write(tmp_path, {f"{name}.csv": ego4d_table(kept)})
    for name in ("whole", "swapped", "empty"):
        for start in (0.0, 3.0, 8.0, 25.0):
            window = np.array(manifest.imu_window(tmp_path / f"{name}.csv", start, 5))
            expected = [t / 1000 for t in times if start <= t / 1000 < start + 5]
            assert window[:, 0].tolist() == expected, (name, start)
    table = "imu,start,seconds\ngap.csv,6,5\ngap.csv,12,5\nwhole.csv,28,5\n"
    source = open_data(str(write(tmp_path, {"m.csv": table}) / "m.csv"))
    assert source.read(1, "imu").shape == (6, 1000)
    for row, reason in ((0, "gap.csv: no rows for 3.0 s of the window"), (2, "whole.csv: no rows for 3.0 s")):
        with pytest.raises(DataError, match=reason):
            source.read(row, "imu")


def test_audiocaps_is_read_from_the_paper_s_list_and_kinetics_is_not_taken_for_it(tmp_path):
    head = "audiocap_id,youtube_id,start_time,caption\n"
    write(tmp_path / "a", {"test.csv": head + f"1,{ID[0]},0,a\n2,{ID[2]},5,b\n",
                           "val.csv": head + f"3,{ID[3]},0,c\n", f"{ID[0]}.wav": 1, f"{ID[2]}.wav": 1})
    source = open_data(f"audiocaps:{tmp_path / 'a'}", "test")
    assert len(source) == 2 and source.note == "read from test.csv"
    write(tmp_path / "a", {"retrieval_test.csv": head + f"2,{ID[2]},5,b\n"})
    paper.open_dataset.cache_clear()
    source = open_data(f"audiocaps:{tmp_path / 'a'}", "test")
    assert len(source) == 1 and source.note == "read from retrieval_test.csv"
    write(tmp_path / "k", {"val.csv": "label,youtube_id,time_start,time_end,split\n"})
    assert tables.find_dataset(tmp_path, "kinetics400") == tmp_path / "k"
    assert tables.find_dataset(tmp_path, "audiocaps") == tmp_path / "a"


def test_pictures_and_videos_by_lists_and_folders(tmp_path):
    picture = np.zeros((5, 5, 3), np.uint8)
    names = "n01 tench, Tinca tinca\nn02 crane\nn03 potter's wheel\nn04 crane\n"
    write(tmp_path / "i", {"LOC_synset_mapping.txt": names,
                           "val/n04/a.JPEG": picture, "val/n01/b.jpeg": picture})
    source = open_data(f"imagenet:{tmp_path / 'i'}", "test")
    assert source.classes == ["tench", "crane", "potter's wheel", "crane"]
    assert [source.label(0), source.label(1)] == [0, 3]
    write(tmp_path / "p", {"categories_places365.txt": "/a/airfield 0\n/a/apartment_building/outdoor 1\n",
                           "places365_val.txt": "Places365_val_00000001.jpg 1\n"
                                                "Places365_val_00000002.jpg 0\n",
                           "val_256/Places365_val_00000001.jpg": picture})
    source = open_data(f"places365:{tmp_path / 'p'}", "test")
    assert source.classes == ["airfield", "outdoor apartment building"]
    assert source.label(0) == 1 and source.absent == 1
    write(tmp_path / "k", {"val.csv": "label,youtube_id,time_start,time_end,split\n"
                                      f"air drumming,{ID[0]},12,22,val\nyoga,{ID[1]},0,10,val\n",
                           f"air drumming/{ID[0]}_000012_000022.mp4": b"", f"{ID[1]}_000000_000010.mp4": b""})
    source = open_data(f"kinetics400:{tmp_path / 'k'}", "test")
    assert source.classes == ["air drumming", "yoga"] and source.absent == 0 and len(source) == 2
    write(tmp_path / "m", {"MSRVTT_JSFUSION_test.csv": "key,vid_key,video_id,sentence\n"
                                                       'ret0,msr9770,video9770,"a person, ""x"""\n',
                           "TestVideo/video9770.MP4": b""})
    row = open_data(f"msrvtt:{tmp_path / 'm'}", "test").row(0)
    assert row["audio"] == row["video"] == "TestVideo/video9770.MP4"  # the sound of the video
    assert open_data(f"msrvtt:{tmp_path / 'm'}", "test").read(0, "text") == 'a person, "x"'


def test_a_wrong_or_empty_folder_is_said_in_one_line(tmp_path):
    for name in DATASETS:
        for root in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(DataError, match=f"^{name}:.*(no |neither)[^\n]*$"):
                open_data(f"{name}:{root}", "test")
    write(tmp_path, {"meta/esc50.csv": "filename,fold,target,category\n1.wav,1,5,dog\n", "audio/x": ""})
    with pytest.raises(DataError, match="none of the 1 items"):
        open_data(f"esc50:{tmp_path}")
    write(tmp_path, {"meta/esc50.csv": "file,label\n1.wav,dog\n"})
    with pytest.raises(DataError, match="filename"):
        open_data(f"esc50:{tmp_path}")
    command = [sys.executable, data.__file__, f"esc51:{tmp_path}"]
    script = subprocess.run(command, capture_output=True, text=True)
    assert script.returncode == 2 and script.stderr.count("\n") == 1 and "audioset, esc50" in script.stderr


def test_data_py_shows_what_lies_in_a_folder(tmp_path, capsys):
    look.show_source(f"audioset:{audioset(tmp_path)}")
    shown = capsys.readouterr().out
    assert "test: 3 items in 3 rows, 1 absent; audio, video; 3 classes: " in shown
    assert "Male speech, man speaking; Dog; Cat" in shown
    assert "audio: in 3 rows, 3 different" in shown and "tensor (3, 1, 128, 204): " in shown
    assert "seconds: 1, 1, 1 (5, 50 and 95 % of 2)" in shown and "1 of 1 cannot be read, the first: " in shown
    assert shown.endswith(f"\npython train.py --pair video-audio --data audioset:{tmp_path} "
                          "--clip ViT-B-16\n")


def test_data_py_warns_of_units_that_are_far_from_the_encoder_s(tmp_path, capsys):
    room = np.random.default_rng(0).uniform(1.2, 4, (60, 80))
    write(tmp_path, {"m.csv": "depth,imu\nmetres.npy,si.npy\n", "mm.csv": "depth,imu\nfloats.npy,raw.npy\n"})
    np.save(tmp_path / "metres.npy", room)
    np.save(tmp_path / "floats.npy", 1000 * room)  # millimetres that say they are metres
    imu = np.random.default_rng(0).normal(0, 3, (6, 200))
    np.save(tmp_path / "si.npy", imu)
    np.save(tmp_path / "raw.npy", 16384 + imu)  # numbers of the sensor
    look.show_source(str(tmp_path / "m.csv"))
    assert "warning" not in capsys.readouterr().out
    look.show_source(str(tmp_path / "mm.csv"))
    shown = capsys.readouterr().out
    assert "warning: depth is far" in shown and "warning: imu is far" in shown


# What is odd about real copies, each oddity k times: what is left out is counted by reason, item by item


def counts(source):
    """{reason: how many}; they add up to what is absent."""
    found = {reason: count for reason, (count, _) in source.reasons.items()}
    assert sum(found.values()) == source.absent
    return found


UNCLEAR = "annotation missing or damaged"


def ids(n):
    """YouTube ids, the same as often as one asks."""
    return [f"{i:02}-_abcdefg" for i in range(n)]


@pytest.mark.parametrize("folder", ["", "metadata/", "VGGSound/data/"])
def test_vggsound_is_found_by_each_usual_name_of_its_clips(tmp_path, folder):
    clip = ids(10)
    lines = [f'{clip[0]},30,"people eating, chewing",test', f"{clip[1]},30,people eating, chewing,test",
             *(f"{c},30,sea,test" for c in clip[2:8]), f"{clip[8]},x,sea,test", f"{clip[9]},30,sea"]
    names = [f"{clip[0]}_000030.mp4", f"{clip[1]}_000030_000040.wav", f"{clip[2]}_30000_40000.flac",
             f"{clip[3]}_30.mp4", f"{clip[4]}.mp4", f"{clip[5]}_000031.mp4", f"{clip[8]}.wav",
             f"{clip[9]}_000030.wav", f"._{clip[6]}_000030.wav"]
    write(tmp_path, {f"{folder}vggsound.csv": "\n".join(lines), **{f"media/{n}": b"" for n in names}})
    source = open_data(f"vggsound:{tmp_path}", "test")
    assert [row["audio"] for row in rows(source)] == [f"media/{name}" for name in names[:5]]
    assert source.classes == ["people eating, chewing", "sea"]
    # of a file that is not named by its start, the row says where in it the clip is
    assert [row["start"] for row in rows(source)] == [""] * 4 + ["30.0"]
    assert counts(source) == {"no file": 3, UNCLEAR: 2}  # of one another clip is there, of one macOS's file


@pytest.mark.parametrize("head", ["# a\n# num_ytids=4, num_segs=4\n# YTID, start_seconds, end_seconds, x\n",
                                  "YTID,start_seconds,end_seconds,labels\n", "", "\n\nid,from,to,what\n"])
def test_audioset_s_header_may_be_any_and_a_damaged_line_costs_itself(tmp_path, head):
    clip = ids(9)
    good = [f'{c}, 30.000, 40.000, "/m/b,/m/a"' for c in clip[:4]]
    damaged = [f'{clip[4]}, 30.000, "/m/a"', f"{clip[5]}", f'{clip[6]}, 0.000, 10.000, "']
    gone = [f'{c}, 0.000, 10.000, "/m/a"' for c in clip[7:]]
    lines = "\n".join([good[0], *damaged, *good[1:3], good[3][:-1], *gone])  # a quote that never closes
    names = [f"{clip[0]}.wav", f"Y{clip[1]}.flac", f"{clip[2]}_30.wav", f"Y{clip[3]}_30.000_40.000.wav",
             *(f"{c}.wav" for c in clip[4:7])]
    write(tmp_path, {"csv/eval_segments.csv": head + lines, **{f"eval/{name}": b"" for name in names},
                     "meta/class_labels_indices.csv": "index,mid,display_name\n0,/m/a,Dog\n1,/m/b,Cat\n"})
    source = open_data(f"audioset:{tmp_path}", "test")
    assert [row["audio"] for row in rows(source)] == [f"eval/{name}" for name in names[:4]]
    assert all(sorted(source.labels(i)) == [0, 1] for i in range(4))
    assert counts(source) == {UNCLEAR: 3, "no file": 2}


def test_an_absent_sound_counts_once_whatever_its_captions(tmp_path):
    captions = ",".join(f"caption_{i}" for i in range(1, 6))
    lines = [f"file_name,{captions}", *(f"{n}.wav,a,b,c,d,e" for n in range(5)),
             "5.wav,a,b", "6.wav,a,b,c,d,e,f"]
    write(tmp_path / "c", {"clotho_captions_evaluation.csv": "\n".join(lines),
                           "clotho_captions_development.csv": f"file_name,{captions}\n0.wav,a,b,c,d,e\n",
                           **{f"clotho_audio_evaluation/{n}.wav": b"" for n in (0, 1, 5, 6)},
                           "clotho_audio_development/0.wav": b""})
    source = open_data(f"clotho:{tmp_path / 'c'}", "test")
    assert len(source) == 10 and counts(source) == {"no file": 3, UNCLEAR: 2}
    train = open_data(f"clotho:{tmp_path / 'c'}", "train")
    assert train.row(0)["audio"] == "clotho_audio_development/0.wav"
    clip = ids(7)
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    for caption in "pq":  # the captions of a sound do not stand together
        lines += [f"{n},{c},30,{caption}" for n, c in enumerate(clip)]
    lines += [f"{n},{c},30" for n, c in enumerate(("short-line1", "short-line2"))]
    names = [f"{clip[0]}.wav", f"{clip[1]}_30.wav", f"Y{clip[2]}.wav", "3.wav", f"Y{clip[4]}_30.wav"]
    write(tmp_path / "a", {"dataset/test.csv": "\n".join(lines), **{f"wav/{name}": b"" for name in names}})
    source = open_data(f"audiocaps:{tmp_path / 'a'}", "test")
    assert [row["audio"] for row in rows(source)] == [f"wav/{name}" for name in names] * 2
    assert counts(source) == {"no file": 2, UNCLEAR: 2}


def test_msrvtt_has_the_files_of_its_releases(tmp_path):
    sentences = [{"video_id": f"video{n}", "caption": f"{n} {i}"} for n in range(6) for i in range(3)]
    damaged = [{"video_id": "video0"}, None, "x"]
    train = "video_id\n" + "".join(f"video{n}\n" for n in range(8))
    test = "key,vid_key,video_id,sentence\n" + "".join(f"r{n},msr{n},video{n},a\n" for n in range(7, 10))
    for root, names in (("jsfusion", ("MSRVTT_JSFUSION_test.csv", "MSRVTT_train.9k.csv")),
                        ("clip4clip", ("msrvtt_data/msrvtt_test.csv", "msrvtt_data/MSRVTT_train.7k.csv"))):
        folder = "msrvtt_data/" if "/" in names[0] else ""
        told = json.dumps({"sentences": sentences + damaged})
        write(tmp_path / root, {names[0]: test, names[1]: train, f"{folder}MSRVTT_data.json": told,
                                **{f"all/video{n}.mp4": b"" for n in (0, 1, 2, 6, 7)}})
        source = open_data(f"msrvtt:{tmp_path / root}", "test")
        assert len(source) == 1 and counts(source) == {"no file": 2}
        source = open_data(f"msrvtt:{tmp_path / root}", "train")
        assert len(source) == 9 and source.items("video")[1].tolist() == [0] * 3 + [3] * 3 + [6] * 3
        assert source.row(0)["audio"] == "all/video0.mp4"  # the sound of the video
        assert counts(source) == {"no file": 3, UNCLEAR: 2}  # of 6 and 7 there are no captions
    write(tmp_path / root, {"msrvtt_data/MSRVTT_data.json": '{"sentences": ['})
    paper.open_dataset.cache_clear()
    with pytest.raises(DataError, match=r"^msrvtt:.*: MSRVTT_data.json: [^\n]*$"):
        open_data(f"msrvtt:{tmp_path / root}", "train")


def test_imagenet_is_read_as_torchvision_and_as_kaggle_lay_it_out(tmp_path):
    wnids = [f"n{i:08}" for i in range(1000)]
    mapping = "".join(f"{wnid} name {i}, other\n" for i, wnid in enumerate(wnids))
    solution = "".join(f"val_{i},{wnids[i]} 1 2 3 4\n" for i in range(6)) + "val_6\nval_7,\n"
    kaggle, base = tmp_path / "kaggle", "ILSVRC/Data/CLS-LOC"
    write(kaggle, {"LOC_synset_mapping.txt": mapping, f"{base}/train/{wnids[3]}/{wnids[3]}_1.JPEG": b"",
                   **{f"{base}/val/val_{i}.JPEG": b"" for i in (0, 1, 2, 6, 7)},
                   "ILSVRC/Annotations/CLS-LOC/val/val_0.xml": ""})
    with pytest.raises(DataError, match="^imagenet:.* 5 in no class folder, and no LOC_val_solution.csv"):
        open_data(f"imagenet:{kaggle}", "test")
    write(kaggle, {"LOC_val_solution.csv": "ImageId,PredictionString\n" + solution})
    paper.open_dataset.cache_clear()
    for root in (kaggle, tmp_path / "parent"):
        source = open_data(f"imagenet:{root}", "test")
        assert source.classes == [f"name {i}" for i in range(1000)]
        assert [source.label(i) for i in range(len(source))] == [0, 1, 2]
        assert counts(source) == {"no file": 3, UNCLEAR: 2}
        (tmp_path / "parent").mkdir(exist_ok=True)
        if root == kaggle:
            kaggle.rename(tmp_path / "parent/imagenet-1k")
    train = open_data(f"imagenet:{tmp_path / 'parent'}", "train")
    assert [train.label(i) for i in range(len(train))] == [3]
    write(tmp_path / "t", {f"val/{wnid}/0.JPEG": b"" for wnid in wnids})  # pictures of one name, too
    source = open_data(f"imagenet:{tmp_path / 't'}", "test")
    assert source.classes == wnids and source.label(999) == 999 and source.absent == 0
    (tmp_path / "t/val" / wnids[0] / "0.JPEG").unlink()
    paper.open_dataset.cache_clear()
    with pytest.raises(DataError, match="no LOC_synset_mapping.txt in it, and 999 classes"):
        open_data(f"imagenet:{tmp_path / 't'}", "test")


@pytest.mark.parametrize("name", ["val.csv", "kinetics400_val.csv", "annotations/val.csv",
                                  "k400/annotations/kinetics_400_val.csv", "validate.csv"])
def test_kinetics_lists_have_several_names_and_another_s_list_is_refused(tmp_path, name):
    clip = ids(8)
    lines = ["label,youtube_id,time_start,time_end,split,is_cc", *(f"yoga,{c},12,22,val,0" for c in clip[:6]),
             f"yoga,{clip[6]},twelve,22,val,0", f"yoga,{clip[7]}"]
    names = [f"{clip[0]}_000012_000022.mp4", f"yoga/{clip[1]}_000012_000022.mp4", f"{clip[2]}.mp4",
             f"{clip[3]}_000013_000023.mp4", f"{clip[6]}.mp4", f"{clip[7]}.mp4"]
    write(tmp_path, {name: "\n".join(lines), **{f"videos/{n}": b"" for n in names}})
    source = open_data(f"kinetics400:{tmp_path}", "test")
    assert [row["video"] for row in rows(source)] == [f"videos/{n}" for n in names[:3]]
    assert counts(source) == {"no file": 3, UNCLEAR: 2} and source.columns == ["video"]
    write(tmp_path, {name: "audiocap_id,youtube_id,start_time,caption\n1,x,0,a\n"})
    paper.open_dataset.cache_clear()
    with pytest.raises(DataError, match="^kinetics400:.*no column label or.*val[^\n]*another list$"):
        open_data(f"kinetics400:{tmp_path}", "test")


def test_ego4d_loses_a_recording_to_a_bad_field_and_no_more(tmp_path):
    uids = [f"uid{i}" for i in range(200) if zlib.crc32(f"uid{i}".encode()) % 5 == 0]
    good = {"scenarios": ["Cooking"], "duration_sec": 60}
    changes = [{}, {}, {"duration_sec": None}, {"duration_sec": 3e5}, {"duration_sec": "x"},
               {"scenarios": None}, {"scenarios": []}, {"scenarios": ["Cooking", "Eating"]}, *[{}] * 5]
    videos = [{"video_uid": uid, **good, **change} for uid, change in zip(uids, changes)]
    del videos[5]["scenarios"]
    damaged = [None, {"scenarios": ["Cooking"]}, {"video_uid": "a", "scenarios": 5}]
    note = {"timestamp_sec": 30, "narration_text": "#C C cuts"}
    bad = [{**note, "timestamp_sec": None}, {"narration_text": "no time"}, {**note, "timestamp_sec": 1}]
    told = {uid: {"narration_pass_1": {"narrations": [note]}} for uid in uids[:8]}
    told[uids[1]]["narration_pass_1"]["narrations"] += bad  # the last has no room around it
    told |= {uids[8]: {}, uids[9]: {"narration_pass_1": None}, uids[10]: None}
    imu = {f"{place}/{uid}.csv": "" for place, uid in zip(["imu", "v2/imu"] * 7, uids[:11])}
    write(tmp_path, {"v2/ego4d.json": json.dumps({"videos": videos + damaged}), **imu,
                     "v1/narration.json": json.dumps(told), "v2/manifest.csv": "uid\n"})
    source = open_data(f"ego4d:{tmp_path}", "test")
    assert [(row["imu"], row["start"]) for row in rows(source)] == [
        (f"imu/{uids[0]}.csv", "27.5"), (f"v2/imu/{uids[1]}.csv", "27.5")]
    assert counts(source) == {"duration missing or absurd": 3, "no scenario": 2, "no narrations": 3,
                              "no file": 2, "damaged narration": 2, UNCLEAR: 3}
    assert source.reasons["duration missing or absurd"] == [3, uids[2]]
    for name in ("v2/ego4d.json", "v1/narration.json"):
        write(tmp_path, {name: '{"videos": [{"video_uid'})
        paper.open_dataset.cache_clear()
        with pytest.raises(DataError, match=rf"^ego4d:.*: {name[3:]}: [^\n]*$"):
            open_data(f"ego4d:{tmp_path}", "test")


def test_a_test_folder_without_a_scene_is_named_and_if_all_are_the_list_is_refused(tmp_path):
    for n in range(8):
        write(tmp_path / "SUNRGBD", scene(f"kv1/NYUdata/NYU000{n}", "office"))
        write(tmp_path / "SUNRGBD", {f"kv1/NYUdata/NYU000{n}/image/._a.JPG": b"what macOS puts beside it"})
    write(tmp_path / "SUNRGBD", scene("kv2/x/train", "lab"))
    place = tmp_path / "SUNRGBD/kv1/NYUdata"
    for n in (2, 3):
        (place / f"NYU000{n}/depth_bfx/a.png").unlink()
    (place / "NYU0004/scene.txt").unlink()
    (place / "NYU0005/intrinsics.txt").write_text("no number")
    lines = [f"SUNRGBD/kv1/NYUdata/NYU000{n}/" for n in range(6)]
    lines += ["kv1/NYUdata/NYU1", "kv2/x/gone", "xtion/a"]
    write(tmp_path, {"test.txt": "\n".join(lines)})
    missing = "test folder without a scene"
    source = open_data(f"sunrgbd:{tmp_path}", "test")
    pictures = [f"SUNRGBD/kv1/NYUdata/NYU000{n}/image/a.JPG" for n in (0, 1)]
    assert [row["image"] for row in rows(source)] == pictures
    assert counts(source) == {"no file": 2, UNCLEAR: 2, missing: 3}
    assert source.reasons[missing] == [3, "kv1/NYUdata/NYU1"]
    assert counts(open_data(f"nyud:{tmp_path}", "test")) == {"no file": 2, UNCLEAR: 2, missing: 1}
    train = open_data(f"sunrgbd:{tmp_path}", "train")
    assert len(train) == 3 and counts(train) == {missing: 3}
    write(tmp_path, {"test.txt": "kv1/NYUdata/nyu0\nkv1/NYUdata/nyu1\n"})
    paper.open_dataset.cache_clear()
    for split in ("train", "test"):  # or every scene would be one to train on
        with pytest.raises(DataError, match="^sunrgbd:.*no test folder is there, such as kv1/NYUdata/nyu0"):
            open_data(f"sunrgbd:{tmp_path}", split)


def test_llvip_one_folder_down_loses_a_picture_to_its_file_or_annotation(tmp_path):
    note = ("<a><size><width>9</width><height>9</height></size><object><bndbox><xmin>0</xmin><ymin>0</ymin>"
            "<xmax>3</xmax><ymax>3</ymax></bndbox></object></a>")
    for n in range(8):
        write(tmp_path / "LLVIP", {f"{kind}/test/{n}.jpg": b"" for kind in ("visible", "infrared")})
        write(tmp_path / "LLVIP", {f"Annotations/{n}.xml": note})
    for name in ("visible/test/1.jpg", "infrared/test/2.jpg", "Annotations/3.xml", "Annotations/4.xml"):
        (tmp_path / "LLVIP" / name).unlink()
    write(tmp_path / "LLVIP", {"Annotations/5.xml": note[:40], "Annotations/6.xml": note.replace("0", "x")})
    source = open_data(f"llvip:{tmp_path}", "test")
    assert len(source) == 4 and source.row(0)["image"] == "LLVIP/visible/test/0.jpg"
    assert counts(source) == {"no file": 2, UNCLEAR: 4}


def test_places_and_esc50_lie_in_small_and_large_and_below_what_an_archive_unpacks_to(tmp_path):
    lines = "".join(f"{n}.jpg {n % 2}\n" for n in range(4)) + "4.jpg\n5.jpg\n"
    classes = "/a/airfield 0\n/a/apartment_building/outdoor 1\n"
    for folder in ("val_256", "val_large"):
        write(tmp_path / folder, {"list/places365_val.txt": lines, "list/categories_places365.txt": classes,
                                  **{f"{folder}/{n}.jpg": b"" for n in (0, 1, 4, 5)}})
        source = open_data(f"places365:{tmp_path / folder}", "test")
        assert source.classes == ["airfield", "outdoor apartment building"]
        assert [source.label(0), source.label(1)] == [0, 1] and counts(source) == {"no file": 2, UNCLEAR: 2}
    write(tmp_path / "p", {"places365_train_standard.txt": "/a/airfield/1.jpg 0\n/b/beach/1.jpg 1\n",
                           "categories_places365.txt": classes, "data_256_standard/a/airfield/1.jpg": b"",
                           "data_256_standard/b/beach/1.jpg": b""})
    assert len(open_data(f"places365:{tmp_path / 'p'}", "train")) == 2  # pictures of one name in two folders
    lines = "".join(f"{n}.wav,1,0,dog\n" for n in range(4)) + "4.wav,1\n5.wav\n"
    esc = {"meta/esc50.csv": "filename,fold,target,category\n" + lines,
           **{f"audio/{n}.wav": b"" for n in (0, 4, 5)}}
    write(tmp_path / "e/ESC-50-master", esc)
    for root in ("e", "e/ESC-50-master"):
        source = open_data(f"esc50:{tmp_path / root}", "test")
        assert len(source) == 1 and counts(source) == {"no file": 3, UNCLEAR: 2}
    write(tmp_path / "f/one", esc)
    write(tmp_path / "f/two", esc)
    with pytest.raises(DataError, match="^esc50:.*no telling which esc50.csv is meant: .*one.*two"):
        open_data(f"esc50:{tmp_path / 'f'}", "test")


def test_an_empty_or_foreign_list_is_named_in_one_line(tmp_path):
    lists = {"esc50": "esc50.csv", "clotho": "clotho_captions_evaluation.csv", "audiocaps": "test.csv",
             "kinetics400": "val.csv", "msrvtt": "msrvtt_test.csv", "vggsound": "vggsound.csv",
             "audioset": "eval_segments.csv", "ego4d": "ego4d.json"}
    for name, file in lists.items():
        for content in ("", "\n\n", "a,b,c\nd,e,f\n", b"\x00\xff\xfe\x80" * 100):
            write(tmp_path / name, {file: content, "evaluation/x.wav": b""})
            paper.open_dataset.cache_clear()
            with pytest.raises(DataError, match=rf"^{name}:[^\n]*{file}[^\n]*$"):
                open_data(f"{name}:{tmp_path / name}", "test")
