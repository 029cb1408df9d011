#!/bin/bash
# A d2v run on a machine that may be taken away at any moment. Make it the machine's start-up script:
#   preemptible.sh modality=audio preset=base stage=pretrain data.path=/mnt/disk/LibriSpeech out=/mnt/disk/runs/base
# `out` lies on a disk that outlives the machine. A new machine with the same disk and the same command goes on.
# `notice` succeeds when the machine is about to be taken: here as Google Cloud says it, half a minute before. (On AWS:
#   token=$(curl -fsX PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" http://169.254.169.254/latest/api/token) &&
#   curl -fsH "X-aws-ec2-metadata-token: $token" http://169.254.169.254/latest/meta-data/spot/instance-action
# two minutes before.)
notice() {
  curl -fsH "Metadata-Flavor: Google" http://metadata.google.internal/computeMetadata/v1/instance/preempted | grep -q TRUE
}

case " $*" in
  *" out="*) ;;
  *) echo "Give out=FOLDER on a disk that outlives the machine." >&2; exit 2 ;;
esac

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=25
torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" --max-restarts 3 -m d2v_core run "$@" resume=auto &
job=$!
trap 'kill -TERM $job' TERM INT # what a machine that shuts down sends
while sleep "${EVERY:-2}"; do
  notice && kill -TERM $job
done &
watch=$!
wait $job
status=$?
while kill -0 $job 2>/dev/null; do # a signal ends the first wait, not the job
  wait $job
  status=$?
done
kill $watch
exit $status
