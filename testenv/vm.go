package testenv

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// VM describes one run of one command in a virtual machine.
type VM struct {
	// Kernel and Initramfs come from FindKernel and Initramfs.
	Kernel    *Kernel
	Initramfs string

	// Args is the command; the guest's PATH is searched.
	Args []string
	// Env is added to the command's environment, as KEY=VALUE.
	Env []string
	// Dir is the command's working directory in the guest; empty means /.
	Dir string
	// Put are files and directories of the host that the guest gets.
	Put []Copy
	// Get are files and directories of the guest that come back when the
	// command has ended, whatever its status.
	Get []Copy

	// Append is added to the kernel's command line.
	Append string
	// CPUs is the number of processors, all emulated by one thread: with one
	// thread per processor QEMU's emulation of text patching is not sound. 0 is 1.
	CPUs int
	// MemoryMiB is the guest's memory; 0 is 1024.
	MemoryMiB int
	// CountInstructions makes a nanosecond of guest time one instruction.
	// Excludes KVM.
	CountInstructions bool
	// KVM uses the host's processor. Only where a test boot works.
	KVM bool
	// Timeout ends a run that hangs; 0 is 10 minutes.
	Timeout time.Duration

	// Stdout and Stderr get what the command writes, as it writes it.
	Stdout, Stderr io.Writer
	// Console gets what the kernel writes to its console. Optional.
	Console io.Writer
	// Log gets messages about the run. Optional.
	Log io.Writer
}

// Copy names a file or directory at two places.
type Copy struct{ Host, Guest string }

// Result says how a command ended in the VM.
type Result struct {
	// Status is the exit status, or 128 + the signal that ended the command.
	Status int
	// Signal ended the command; 0 if it exited.
	Signal syscall.Signal
	// Boot is the time until the command was started, Total until QEMU ended.
	Boot, Total time.Duration
	// Warning is what the kernel logged with its first WARN_ON, or empty.
	Warning string
}

// The ways in which a VM fails. Errors of Run wrap one of them.
var (
	ErrBoot    = errors.New("the guest did not boot")
	ErrPanic   = errors.New("the guest's kernel panicked")
	ErrTimeout = errors.New("the guest did not end in time")
	ErrDied    = errors.New("QEMU ended before the command did")
)

// A VMError is a failure of the VM and not of the command in it.
type VMError struct {
	Kind    error  // ErrBoot, ErrPanic, ErrTimeout or ErrDied
	Detail  string // what QEMU or init had to say
	Console string // the end of the kernel's console
}

func (e *VMError) Unwrap() error { return e.Kind }

func (e *VMError) Error() string {
	s := e.Kind.Error()
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Console != "" {
		s += "\nthe console's end:\n" + indent(e.Console)
	} else {
		s += " (the console is empty)"
	}
	return s
}

func indent(s string) string {
	return "  " + strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n  ")
}

// Run boots the VM, runs the command and returns how it ended. The error is a
// *VMError if the VM failed. The command's own failure is no error.
//
// The calling program must be the one that has IsGuestInit and GuestInit in its
// main: it is the guest's init, too. For a kernel of another architecture init is that
// program built for it, found beside this one as ARCH/NAME.
func (v *VM) Run(ctx context.Context) (*Result, error) {
	if len(v.Args) == 0 {
		return nil, errors.New("no command to run")
	}
	timeout := v.Timeout
	if timeout == 0 {
		timeout = 10 * time.Minute
	}
	initrd, err := v.initrd(ctx)
	if err != nil {
		return nil, err
	}
	defer initrd.Close()

	runCtx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	qemu := machines[v.Kernel.Arch]
	args := v.qemuArgs()
	cmd := exec.CommandContext(runCtx, qemu.program)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // a terminal's ^C is ours to handle
	}
	var qemuErr bytes.Buffer
	cmd.Stderr = &qemuErr

	// QEMU gets files without a name: nothing is left if all of us are killed.
	// Descriptors start at 3 in the order of ExtraFiles.
	cmd.ExtraFiles = []*os.File{initrd}
	args = append(args, "-initrd", "/dev/fd/3")
	var closers []io.Closer
	defer func() {
		for _, c := range closers {
			c.Close()
		}
	}()
	stream := func(id string) (*os.File, error) {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		closers = append(closers, r, w)
		fd := 3 + len(cmd.ExtraFiles)
		cmd.ExtraFiles = append(cmd.ExtraFiles, w)
		args = append(args,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, fd),
			"-chardev", fmt.Sprintf("file,id=%s,append=on,path=/dev/fdset/%d", id, fd))
		return r, nil
	}
	var readers [4]*os.File
	for i, id := range []string{"console", "out", "err", "ctl"} {
		if readers[i], err = stream(id); err != nil {
			return nil, err
		}
	}
	args = append(args, "-serial", "chardev:console",
		"-device", "virtio-serial-pci,ioeventfd=off",
		"-device", "virtserialport,chardev=out,name="+portOut,
		"-device", "virtserialport,chardev=err,name="+portErr,
		"-device", "virtserialport,chardev=ctl,name="+portControl)
	cmd.Args = append(cmd.Args[:1], args...)

	start := time.Now()
	if err := cmd.Start(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return nil, fmt.Errorf("%w; it is in the package %s, which make setup and make setup-arm64 install", err, qemu.pkg)
		}
		return nil, err
	}
	for _, f := range cmd.ExtraFiles[1:] {
		f.Close()
	}

	var (
		wg       sync.WaitGroup
		console  tail
		boot     time.Duration
		report   *exitReport
		getErr   error
		copyErrs [3]error
	)
	copyAll := func(i int, to io.Writer) {
		if to == nil {
			to = io.Discard
		}
		wg.Go(func() {
			_, err := io.Copy(to, readers[i])
			if err != nil {
				copyErrs[i] = err
				io.Copy(io.Discard, readers[i]) // the guest must not block on us
			}
		})
	}
	if v.Console != nil {
		copyAll(0, io.MultiWriter(&console, v.Console))
	} else {
		copyAll(0, &console)
	}
	copyAll(1, v.Stdout)
	copyAll(2, v.Stderr)
	wg.Go(func() {
		report, getErr = v.readControl(readers[3], func() { boot = time.Since(start) })
		io.Copy(io.Discard, readers[3])
	})
	waitErr := cmd.Wait()
	wg.Wait()

	if report != nil {
		res := &Result{Status: report.Status, Boot: boot, Total: time.Since(start), Warning: report.Log}
		if report.Warned && res.Warning == "" {
			res.Warning = "(its text is no longer in the kernel's log)"
		}
		if report.Signal != 0 {
			res.Signal = syscall.Signal(report.Signal)
			res.Status = 128 + report.Signal
		}
		if report.Error != "" {
			return nil, fmt.Errorf("%s did not start: %s", v.Args[0], report.Error)
		}
		return res, errors.Join(append(copyErrs[1:], getErr)...)
	}

	// The command's end was not seen. Say what happened instead.
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	e := &VMError{Console: console.String(), Detail: strings.TrimSpace(qemuErr.String())}
	switch {
	case console.panicked():
		e.Kind = ErrPanic
	case runCtx.Err() != nil && boot == 0:
		e.Kind, e.Detail = ErrBoot, fmt.Sprintf("init had not come up after %v", timeout)
	case runCtx.Err() != nil:
		e.Kind, e.Detail = ErrTimeout, fmt.Sprintf("%s still ran after %v; -timeout gives it longer", v.Args[0], timeout)
	case boot == 0:
		e.Kind = ErrBoot
	default:
		e.Kind = ErrDied
	}
	if e.Detail == "" && waitErr != nil {
		e.Detail = waitErr.Error()
	}
	return nil, e
}

// machines are QEMU's program and what it is told, for each architecture.
var machines = map[string]struct {
	program, pkg string
	cpu          string // emulated
	args         []string
	cmdline      string
}{
	"": {
		program: "qemu-system-x86_64", pkg: "qemu-system-x86",
		// Emulated (QEMU 7.2), cmpxchg16b leaves another instruction's operand in EFLAGS: an
		// interrupt right behind it, where the kernel takes memory from a slab, comes back with
		// random flags, to a panic or worse. Without the feature the kernel does not use it.
		//
		// "Enhanced rep movsb and stosb" are, emulated, a loop of single bytes: the kernel, told
		// that they are fast, clears a page in 4096 steps, and in 512 without the feature.
		cpu:  "max,-cx16,-erms",
		args: []string{"-machine", "q35"},
		// On a busy host the emulated timer may not tick in the time that the kernel gives it.
		cmdline: "console=ttyS0 no_timer_check",
	},
	"arm64": {
		program: "qemu-system-aarch64", pkg: "qemu-system-arm",
		// The kernel signs return addresses; the architecture's own cipher is slow to emulate.
		cpu:     "max,pauth-impdef=on",
		args:    []string{"-machine", "virt,gic-version=3"},
		cmdline: "console=ttyAMA0",
	},
}

func (v *VM) qemuArgs() []string {
	m := machines[v.Kernel.Arch]
	accel, cpu := "tcg,thread=single", m.cpu
	if v.KVM {
		accel, cpu = "kvm", "max"
	}
	cmdline := m.cmdline + " quiet loglevel=3 panic=-1 oops=panic mitigations=off log_buf_len=16M printk.devkmsg=on rdinit=/init" +
		// Self-tests of ciphers that no test uses: 1.5 s of a boot under emulation.
		" cryptomgr.notests initcall_blacklist=crypto_kdf108_init,init_encrypted,jent_mod_init"
	if v.Append != "" {
		cmdline += " " + v.Append
	}
	args := append(slices.Clone(m.args),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", accel, "-cpu", cpu,
		"-smp", strconv.Itoa(max(v.CPUs, 1)),
		"-m", strconv.Itoa(cmp.Or(v.MemoryMiB, 1024)),
		"-kernel", v.Kernel.Image(), "-append", cmdline)
	if v.CountInstructions {
		args = append(args, "-icount", "shift=0,sleep=off")
	}
	return args
}

// initrd makes the guest's file system: the base archive, followed by one with
// init, what it is to do and the files that were put. The file has no name.
func (v *VM) initrd(ctx context.Context) (*os.File, error) {
	f, err := os.CreateTemp("", "nftrace-initrd-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	if err := v.writeInitrd(ctx, f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (v *VM) writeInitrd(ctx context.Context, f *os.File) error {
	base, err := os.Open(v.Initramfs)
	if err != nil {
		return err
	}
	defer base.Close()
	if _, err := io.Copy(f, base); err != nil {
		return err
	}
	s := spec{Args: v.Args, Dir: v.Dir, Env: append([]string{"NFTRACE_IN_VM=1"}, v.Env...)}
	for _, g := range v.Get {
		s.Get = append(s.Get, g.Guest)
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	a := newArchive(f)
	a.data(specPath, 0o600, b)
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	files := map[string]string{}
	if v.Kernel.Arch == "" {
		// Built without cgo this is one static file; otherwise it needs libraries.
		r, err := machineRoot(ctx)
		if err != nil {
			return err
		}
		if err := r.add(files, "/init", exe); err != nil {
			return err
		}
	} else {
		init := filepath.Join(filepath.Dir(exe), v.Kernel.Arch, filepath.Base(exe))
		if _, err := os.Stat(init); err != nil {
			return fmt.Errorf("the guest's init is this program, built for %s: %w", v.Kernel.Arch, err)
		}
		files["/init"] = init
	}
	for _, name := range sortedKeys(files) {
		a.file(name, files[name])
	}
	for _, p := range v.Put {
		if !path.IsAbs(p.Guest) {
			return fmt.Errorf("put %s: the path in the guest, %q, must be absolute", p.Host, p.Guest)
		}
		a.tree(mergedPath(p.Guest), p.Host)
	}
	return a.close()
}

// mergedPath keeps a file from replacing the links /bin, /sbin, /lib and /lib64.
func mergedPath(p string) string {
	p = path.Clean(p)
	first, _, _ := strings.Cut(p[1:], "/")
	switch first {
	case "bin", "sbin", "lib", "lib64":
		return "/usr" + p
	}
	return p
}

// readControl reads the control port to the end of the report. A nil report
// means that the guest did not get that far.
func (v *VM) readControl(r io.Reader, started func()) (*exitReport, error) {
	var errs []error
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err != nil {
			return nil, errors.Join(errs...)
		}
		kind, rest, _ := strings.Cut(h.Name, "/")
		switch kind {
		case "started":
			started()
		case "file", "missing":
			n, rel, _ := strings.Cut(rest, "/")
			i, err := strconv.Atoi(n)
			if err != nil || i < 0 || i >= len(v.Get) || rel != "" && !filepath.IsLocal(rel) {
				errs = append(errs, fmt.Errorf("the guest sent an entry that nobody asked for: %q", h.Name))
				continue
			}
			if kind == "missing" {
				b, _ := io.ReadAll(io.LimitReader(tr, 4096))
				errs = append(errs, fmt.Errorf("get %s: %s", v.Get[i].Guest, b))
				continue
			}
			if err := saveFile(filepath.Join(v.Get[i].Host, rel), tr, os.FileMode(h.Mode).Perm()); err != nil {
				errs = append(errs, fmt.Errorf("get %s: %w", v.Get[i].Guest, err))
			}
		case "exit":
			var report exitReport
			if err := json.NewDecoder(tr).Decode(&report); err != nil {
				return nil, errors.Join(errs...)
			}
			return &report, errors.Join(errs...)
		}
	}
}

func saveFile(name string, r io.Reader, perm os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, r); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// tail keeps the end of what is written to it.
type tail struct {
	mu    sync.Mutex
	buf   []byte
	panic bool
}

const (
	tailKeep  = 16 << 10
	tailLines = 60
)

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if bytes.Contains(t.buf, []byte("Kernel panic - not syncing")) {
		t.panic = true
	}
	if len(t.buf) > 2*tailKeep {
		t.buf = append(t.buf[:0], t.buf[len(t.buf)-tailKeep:]...)
	}
	return len(p), nil
}

func (t *tail) panicked() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.panic
}

// String returns the last lines, with control characters made visible.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.ReplaceAll(string(t.buf), "\r", "")
	text = strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && (r < ' ' || r == 0x7f) {
			return '·'
		}
		return r
	}, text)
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-tailLines):], "\n")
}
