import json, time, sys
import pytest
from integration.jobs import Jobs, manifest, wait
from testcluster import PodRunner, hang
from integration.test_operator_progress import Pod
def test_probe(cluster, operator, namespace):
    with PodRunner(cluster.kubeconfig, lambda _p: hang(20)) as runner:
        jobs=Jobs(cluster, namespace)
        vol=[{"name":"api","projected":{"sources":[{"serviceAccountToken":{"path":"token"}}]}}]
        jobs.apply(manifest("tok", trainer={"podTemplate":{"spec":{"volumes":vol,"volumeMounts":[{"name":"api","mountPath":"/api"}]}}}))
        pod=Pod(jobs,"tok-1"); runner.wait_running(pod.name)
        print("PROBE projected token volume in pod:", [v for v in pod.object["spec"]["volumes"] if v["name"]=="api"])
        t=pod.token(); head,_,sig=t.rpartition(".")
        codes=[pod.post(t)[0] for _ in range(30)]
        print("PROBE one token:",{c:codes.count(c) for c in set(codes)})
        al="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        ok=[]
        for ch in al:
            v=head+"."+sig[:-1]+ch
            if v==t: continue
            ok.append(pod.post(v)[0])
        print("PROBE sig len",len(sig),"variants:",{c:ok.count(c) for c in set(ok)})
        for what,v in (("space",t[:-5]+" "+t[-5:]),("trailing pad",t+"="),("lead space"," "+t)):
            print("PROBE",what,pod.post(v)[0])
        ok=[pod.post(t,url=pod.url.replace("/attempts/1/","/attempts/01/"))[0], pod.post(t,url=pod.url.replace("/attempts/1/","/attempts/001/"))[0]]
        print("PROBE 01:",ok)
def test_psa(cluster, operator, namespace):
    cluster.kubectl("label","namespace",namespace,"pod-security.kubernetes.io/enforce=restricted")
    jobs=Jobs(cluster, namespace)
    jobs.apply(manifest("host", trainer={"podTemplate":{"spec":{"volumes":[{"name":"h","hostPath":{"path":"/"}}],"volumeMounts":[{"name":"h","mountPath":"/h"}]}}}))
    time.sleep(8)
    print("PROBE", jobs.status("host").get("state"), json.dumps(jobs.condition("host","Running")), "pods", len(jobs.list("pods")), "jobs", len(jobs.list("jobs")))
    print("PROBE", cluster.kubectl("-n",namespace,"get","events").stdout)
