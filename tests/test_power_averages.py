import harness
def test_x(tiny_data, tmp_path):
    run = tmp_path/"run"
    args = harness.arguments(run, tiny_data, ema__profiles="[0.05,0.08,0.1]", ema__every_kimg=0.016, growth__stable_kimg=.064)
    print(harness.finish(harness.start(args)))
    import subprocess
    print(subprocess.run(["ls","-la",str(run/"averages")],capture_output=True,text=True).stdout)
    from stylegan_pg.checkpoint import averages
    for s in averages.found(run/"averages"): print(s.path.name,s.width,s.since,s.nimg,s.batch,s.buffers[:3],s.description["alpha"])
    from stylegan_pg import load_snapshot
    load_snapshot(s.path)
