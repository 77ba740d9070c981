package testenv

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// IsGuestInit tells whether this process is the init of a VM that Run started.
func IsGuestInit() bool {
	if os.Getpid() != 1 {
		return false
	}
	_, err := os.Stat(specPath)
	return err == nil
}

// GuestInit is the guest's init: it mounts, runs the command, reports and
// powers off. It does not return.
func GuestInit() {
	if err := guestMain(); err != nil {
		// There may be no port to say it on: the console always works.
		if f, cerr := os.OpenFile("/dev/console", os.O_WRONLY, 0); cerr == nil {
			fmt.Fprintf(f, "%s%v\n", guestFailed, err)
			f.Close()
		}
	}
	syscall.Sync()
	// QEMU runs with -no-reboot: a restart ends it, and needs no ACPI.
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	select {}
}

// guestFailed begins the line with which init says on the console why it gave up.
const guestFailed = "nftrace-guest: "

var guestMounts = []struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}{
	{"proc", "/proc", "proc", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", "devtmpfs", syscall.MS_NOSUID, "mode=755"},
	{"devpts", "/dev/pts", "devpts", syscall.MS_NOSUID | syscall.MS_NOEXEC, "mode=620,ptmxmode=666"},
	{"tmpfs", "/dev/shm", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=1777"},
	{"tmpfs", "/tmp", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=1777"},
	{"tmpfs", "/run", "tmpfs", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=755"},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
	{"bpf", "/sys/fs/bpf", "bpf", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, "mode=700"},
	{"tracefs", "/sys/kernel/tracing", "tracefs", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
	{"debugfs", "/sys/kernel/debug", "debugfs", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
	{"securityfs", "/sys/kernel/security", "securityfs", syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC, ""},
}

func guestMain() error {
	for _, m := range guestMounts {
		// What was put into /tmp is not to be hidden; the root is in memory anyway.
		if m.fstype == "tmpfs" {
			if e, err := os.ReadDir(m.target); err == nil && len(e) > 0 {
				continue
			}
		}
		os.MkdirAll(m.target, 0o755)
		if err := syscall.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		os.Symlink(target, "/dev/"+name)
	}
	// A process that nothing has set up PATH for.
	os.Setenv("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/root")
	os.Setenv("TERM", "dumb")
	for _, c := range [][]string{
		{"modprobe", "-a", "-q", "virtio_pci", "virtio_console"}, // modules, or built in
		{"ip", "link", "set", "lo", "up"},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", c[0], err, out)
		}
	}
	syscall.Sethostname([]byte("nftrace-vm"))

	b, err := os.ReadFile(specPath)
	if err != nil {
		return err
	}
	var s spec
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("%s: %w", specPath, err)
	}
	os.RemoveAll(path.Dir(specPath))

	ports, err := openPorts(portOut, portErr, portControl)
	if err != nil {
		return err
	}
	control := tar.NewWriter(ports[portControl])
	if err := send(control, "started", nil); err != nil {
		return err
	}
	report := runCommand(s, ports[portOut], ports[portErr])
	for i, name := range s.Get {
		if err := sendFiles(control, fmt.Sprint("file/", i), name); err != nil {
			if err := send(control, fmt.Sprint("missing/", i), []byte(err.Error())); err != nil {
				return err
			}
		}
	}
	report.Warned, report.Log = kernelWarning()
	b, err = json.Marshal(report)
	if err != nil {
		return err
	}
	return send(control, "exit", b)
}

// openPorts opens virtio-serial ports by name. Their names come from the host
// shortly after the driver is up, so they may have to be waited for.
func openPorts(names ...string) (map[string]*os.File, error) {
	ports := map[string]*os.File{}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		dirs, _ := filepath.Glob("/sys/class/virtio-ports/*")
		for _, d := range dirs {
			b, err := os.ReadFile(filepath.Join(d, "name"))
			name := strings.TrimSpace(string(b))
			if err != nil || ports[name] != nil {
				continue
			}
			// O_NONBLOCK off: a write returns when the host has the bytes.
			fd, err := syscall.Open("/dev/"+filepath.Base(d), syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			ports[name] = os.NewFile(uintptr(fd), name)
		}
		missing := ""
		for _, n := range names {
			if ports[n] == nil {
				missing = n
			}
		}
		if missing == "" {
			return ports, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no virtio-serial port %s: the kernel needs virtio_pci and virtio_console", missing)
		}
	}
}

// runCommand runs the command to its end, copying what it writes, and ends all
// that it left running.
func runCommand(s spec, stdout, stderr io.Writer) exitReport {
	// The command gets pipes and not the ports: a port can be opened only
	// once, so /dev/stdout would not work.
	var wg sync.WaitGroup
	pipe := func(to io.Writer) (*os.File, error) {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		wg.Go(func() { io.Copy(to, r) })
		return w, nil
	}
	fail := func(err error) exitReport { return exitReport{Error: err.Error()} }
	outW, err := pipe(stdout)
	if err != nil {
		return fail(err)
	}
	errW, err := pipe(stderr)
	if err != nil {
		return fail(err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		return fail(err)
	}
	for _, e := range s.Env {
		k, v, _ := strings.Cut(e, "=")
		os.Setenv(k, v)
	}
	if s.Dir != "" {
		if err := os.Chdir(s.Dir); err != nil {
			return fail(err)
		}
	}
	program, err := exec.LookPath(s.Args[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return fail(err)
	}
	p, err := os.StartProcess(program, s.Args, &os.ProcAttr{
		Env: os.Environ(), Files: []*os.File{null, outW, errW}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fail(err)
	}
	outW.Close()
	errW.Close()
	// As init we inherit every orphan, so wait for anybody.
	var report exitReport
	for {
		var st syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &st, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return fail(fmt.Errorf("wait: %w", err))
		}
		if pid != p.Pid {
			continue
		}
		if st.Signaled() {
			report.Signal = int(st.Signal())
		} else {
			report.Status = st.ExitStatus()
		}
		break
	}
	// Nobody may hold the pipes any more.
	syscall.Kill(-1, syscall.SIGKILL)
	wg.Wait()
	return report
}

// send writes one entry to the control port.
func send(w *tar.Writer, name string, content []byte) error {
	err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))})
	if err != nil {
		return err
	}
	if _, err := w.Write(content); err != nil {
		return err
	}
	return w.Flush()
}

// sendFiles sends a file, or a directory's regular files.
func sendFiles(w *tar.Writer, as, name string) error {
	if _, err := os.Stat(name); err != nil {
		return err
	}
	return filepath.WalkDir(name, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		rel, err := filepath.Rel(name, p)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: path.Join(as, rel), Mode: int64(st.Mode().Perm()), Size: st.Size()}); err != nil {
			return err
		}
		if _, err := io.CopyN(w, f, st.Size()); err != nil {
			return err
		}
		return w.Flush()
	})
}

// kernelWarning tells whether the kernel ran into a WARN_ON since boot, and
// what it logged there.
func kernelWarning() (bool, string) {
	b, err := os.ReadFile("/proc/sys/kernel/tainted")
	if err != nil {
		return false, ""
	}
	var taint uint64
	fmt.Sscan(string(b), &taint)
	const taintWarn = 1 << 9 // TAINT_WARN, include/linux/panic.h
	if taint&taintWarn == 0 {
		return false, ""
	}
	buf := make([]byte, 32<<20)
	n, err := syscall.Klogctl(3 /* SYSLOG_ACTION_READ_ALL */, buf)
	if err != nil {
		return true, ""
	}
	log := string(buf[:n])
	if i := strings.Index(log, "WARNING: "); i >= 0 {
		log = log[strings.LastIndexByte(log[:i], '\n')+1:]
	}
	lines := strings.SplitAfter(log, "\n")
	return true, strings.Join(lines[:min(len(lines), 60)], "")
}
