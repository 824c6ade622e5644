#!/bin/busybox sh
# The test VM's first process: the host's files, read-only, below a layer in memory; then the job, then off.
# /job.env has KERNEL_DIR (the unpacked package) and RELEASE; /job is a shell script. ttyS1 shows what the job prints,
# ttyS2 its exit code.
/bin/busybox --install -s /bin
export PATH=/bin
stop() { echo "init: $*" > /dev/ttyS1; poweroff -f; }

mkdir -p /proc /sys /dev /host /layer
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
. /job.env
for module in /modules/*; do
    insmod "$module" || stop "insmod $module"
done
mount -t virtiofs -o ro host /host || stop "the host's files are not there"
mount -t tmpfs -o size=75% layer /layer
mkdir -p /layer/upper /layer/work /layer/root
root=/layer/root
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root $root || stop "no overlay"

mkdir -p $root/lib/modules/$RELEASE
mount --bind "$root$KERNEL_DIR/lib/modules/$RELEASE" $root/lib/modules/$RELEASE || stop "no modules"
cp /job $root/job
for dir in proc sys dev; do
    mount --move /$dir $root/$dir
done
mkdir -p $root/dev/pts $root/dev/shm
mount -t devpts devpts $root/dev/pts
mount -t tmpfs shm $root/dev/shm
mount -t tmpfs run $root/run
# Some kernels offer these only once a module is in: the job complains better than we could.
mount -t cgroup2 cgroup $root/sys/fs/cgroup
mount -t bpf bpf $root/sys/fs/bpf
ln -sf /proc/self/fd $root/dev/fd
hostname vm
ip link set lo up
exec switch_root $root /bin/sh -c '
    stty -F /dev/ttyS1 -opost
    /bin/sh /job < /dev/null > /dev/ttyS1 2>&1
    echo $? > /dev/ttyS2
    echo o > /proc/sysrq-trigger
    sleep 60'
