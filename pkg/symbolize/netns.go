package symbolize

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// System says where things are on this machine. NewSystem gives the usual
// places; tests give their own.
type System struct {
	// Proc is /proc. Of each process only ns/net is looked at, of the rest modules
	// and kallsyms.
	Proc string
	// NetnsDirs hold namespaces bound to files. Those in the first are named
	// after the file (ip netns); those in others have no name for people.
	NetnsDirs []string
	// Sockets are the engines' API sockets, in the order of preference.
	Sockets []string
	// BuiltIn, if set, tells of some modules whether they are built into the kernel.
	BuiltIn func(module string) bool

	own   uint32 // inode of the namespace that nftrace runs in
	anyFS bool   // tests: files stand for namespaces

	mu    sync.Mutex
	names map[uint32]string // of containers' namespaces, by inode

	builtInOnce sync.Once
	builtIn     map[string]bool // modules, by the kernel's symbols
}

// NewSystem returns this machine as it usually is. It honours DOCKER_HOST.
func NewSystem() (*System, error) {
	s := &System{
		Proc:      "/proc",
		NetnsDirs: []string{"/run/netns", "/run/docker/netns"},
		Sockets:   engineSockets(os.Getenv("DOCKER_HOST")),
	}
	return s, s.init()
}

func (s *System) init() error {
	own, err := s.inode(filepath.Join(s.Proc, "self/ns/net"))
	if err != nil {
		return fmt.Errorf("own network namespace: %w", err)
	}
	s.own = own
	return nil
}

// Namespace is a network namespace. It holds nothing open: a namespace that
// somebody deletes goes away although nftrace knows it.
type Namespace struct {
	Inode uint32
	// Name is for people: "" for the one that nftrace runs in, the name that ip
	// netns knows, the container's, else "net:[INODE]".
	Name string
	// Path led to it when it was found.
	Path string

	sys *System
}

// Own tells whether nftrace runs in it.
func (n *Namespace) Own() bool { return n.Inode == n.sys.own }

// ErrNoNamespace is returned where no process and no file leads to a namespace.
var ErrNoNamespace = errors.New("no such network namespace")

// inode returns the inode number of the namespace behind path.
func (s *System) inode(path string) (uint32, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return s.inodeOf(fd, path)
}

func (s *System) inodeOf(fd int, path string) (uint32, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if fs.Type != unix.NSFS_MAGIC && !s.anyFS {
		return 0, fmt.Errorf("%s is not a network namespace", path)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return uint32(st.Ino), nil
}

// each calls f with every path that may lead to a namespace, until f returns
// true: files first, since processes are many.
func (s *System) each(f func(path string) bool) {
	if f(filepath.Join(s.Proc, "self/ns/net")) {
		return
	}
	for _, dir := range s.NetnsDirs {
		files, _ := os.ReadDir(dir) // mostly not there
		for _, e := range files {
			if f(filepath.Join(dir, e.Name())) {
				return
			}
		}
	}
	procs, _ := os.ReadDir(s.Proc)
	for _, e := range procs {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		if f(filepath.Join(s.Proc, e.Name(), "ns/net")) {
			return
		}
	}
}

// NamespaceByInode finds a network namespace by its inode number, as
// readlink /proc/PID/ns/net prints it and the kernel has it in net->ns.inum.
func (s *System) NamespaceByInode(inum uint32) (*Namespace, error) {
	var found string
	s.each(func(path string) bool {
		if i, err := s.inode(path); err == nil && i == inum {
			found = path
		}
		return found != ""
	})
	if found == "" {
		return nil, fmt.Errorf("%w: net:[%d]", ErrNoNamespace, inum)
	}
	return s.namespace(inum, found), nil
}

// OwnNamespace is the namespace that nftrace runs in.
func (s *System) OwnNamespace() *Namespace {
	return s.namespace(s.own, filepath.Join(s.Proc, "self/ns/net"))
}

// Namespaces lists every network namespace that a process or a file leads to.
func (s *System) Namespaces() []*Namespace {
	seen := map[uint32]bool{}
	bound := s.bound()
	var all []*Namespace
	s.each(func(path string) bool {
		if i, err := s.inode(path); err == nil && !seen[i] {
			seen[i] = true
			all = append(all, &Namespace{Inode: i, Name: s.name(i, bound), Path: path, sys: s})
		}
		return false
	})
	return all
}

func (s *System) namespace(inum uint32, path string) *Namespace {
	return &Namespace{Inode: inum, Name: s.NetnsName(inum), Path: path, sys: s}
}

// NetnsName names a namespace for people, whether it still exists or not.
func (s *System) NetnsName(inum uint32) string {
	if inum == s.own {
		return ""
	}
	return s.name(inum, s.bound())
}

// bound are the names that ip netns knows: each is a file, all of which are looked at. nftrace's own namespace
// has none.
func (s *System) bound() map[uint32]string {
	names := map[uint32]string{s.own: ""}
	if len(s.NetnsDirs) == 0 {
		return names
	}
	files, _ := os.ReadDir(s.NetnsDirs[0])
	for _, e := range files {
		i, err := s.inode(filepath.Join(s.NetnsDirs[0], e.Name()))
		if _, ok := names[i]; err == nil && !ok {
			names[i] = e.Name()
		}
	}
	return names
}

// name is that of a namespace, where bound says what ip netns knows.
func (s *System) name(inum uint32, bound map[uint32]string) string {
	if n, ok := bound[inum]; ok {
		return n
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.names[inum]; ok {
		return n
	}
	return fmt.Sprintf("net:[%d]", inum)
}

// learn remembers the name of a container's namespace.
func (s *System) learn(inum uint32, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names == nil {
		s.names = map[uint32]string{}
	}
	s.names[inum] = name
}

// ResolveNetns finds the namespace that a user names: NAME (ip netns), a path,
// pid:N, or net:[INODE] as nftrace prints it.
func (s *System) ResolveNetns(spec string) (*Namespace, error) {
	var path string
	switch {
	case spec == "":
		return nil, errors.New("empty network namespace: give NAME, PATH or pid:N")
	case strings.HasPrefix(spec, "pid:"):
		pid, err := netnsNumber(spec)
		if err != nil {
			return nil, err
		}
		path = filepath.Join(s.Proc, strconv.FormatUint(pid, 10), "ns/net")
		if _, err := s.inode(path); errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%w: no process %d", ErrNoNamespace, pid)
		}
	case strings.HasPrefix(spec, "net:[") && strings.HasSuffix(spec, "]"):
		i, err := netnsNumber(spec)
		if err != nil {
			return nil, err
		}
		return s.NamespaceByInode(uint32(i))
	case strings.ContainsRune(spec, '/'):
		path = spec
	default:
		if len(s.NetnsDirs) == 0 || spec == "." || spec == ".." {
			return nil, fmt.Errorf("%w: %q", ErrNoNamespace, spec)
		}
		path = filepath.Join(s.NetnsDirs[0], spec)
	}
	inum, err := s.inode(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s does not exist", ErrNoNamespace, path)
	}
	if err != nil {
		return nil, err
	}
	return s.namespace(inum, path), nil
}

// CheckNetns tells what is wrong with a name that ResolveNetns can never find.
func CheckNetns(spec string) error {
	_, err := netnsNumber(spec)
	return err
}

// netnsNumber is N of pid:N and net:[N], 0 for other names.
func netnsNumber(spec string) (n uint64, err error) {
	if pid, ok := strings.CutPrefix(spec, "pid:"); ok {
		if n, err = strconv.ParseUint(pid, 10, 31); err != nil || n == 0 {
			return 0, fmt.Errorf("%q: pid:N wants a process number", spec)
		}
	} else if strings.HasPrefix(spec, "net:[") && strings.HasSuffix(spec, "]") {
		if n, err = strconv.ParseUint(spec[5:len(spec)-1], 10, 32); err != nil {
			return 0, fmt.Errorf("%q: net:[N] wants an inode number", spec)
		}
	}
	return n, nil
}

// open opens the namespace, along another path where the first one is gone
// or leads elsewhere now.
func (n *Namespace) open() (int, error) {
	for range 2 {
		fd, err := unix.Open(n.Path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err == nil {
			if i, err := n.sys.inodeOf(fd, n.Path); err == nil && i == n.Inode {
				return fd, nil
			}
			unix.Close(fd)
		}
		again, err := n.sys.NamespaceByInode(n.Inode)
		if err != nil {
			return -1, err
		}
		// n may be shared; the next call looks again.
		n = again
	}
	return -1, fmt.Errorf("%w: net:[%d]", ErrNoNamespace, n.Inode)
}

// Do calls f on an OS thread that is inside the namespace, and returns what f
// returns. Programs that f starts are inside as well; goroutines that it
// starts are not. It needs CAP_SYS_ADMIN unless the namespace is nftrace's own. f must not call Do.
func (n *Namespace) Do(f func() error) error {
	// All threads are in this one that are in no other by doHere. Another goroutine could have to wait,
	// while garbage is collected, for longer than the ruleset that it is to read is there.
	if n.Own() {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			done <- n.doHere(f)
			return
		}
		// /proc/self/ns/net shows the main thread's namespace: leave that alone,
		// and hold the thread so that the next goroutine gets another.
		defer runtime.UnlockOSThread()
		inner := make(chan error, 1)
		go func() {
			defer close(inner)
			runtime.LockOSThread()
			inner <- n.doHere(f)
		}()
		if err, ok := <-inner; ok {
			done <- err
		}
	}()
	err, ok := <-done
	if !ok {
		return errors.New("the function ended its goroutine (runtime.Goexit)")
	}
	return err
}

// doHere does so on the calling goroutine's thread, which it is locked to. It
// unlocks it, unless the thread could not switch back: it then ends with the
// goroutine.
func (n *Namespace) doHere(f func() error) error {
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("own network namespace: %w", err)
	}
	defer unix.Close(home)
	fd, err := n.open()
	if err == nil {
		err = unix.Setns(fd, unix.CLONE_NEWNET)
		unix.Close(fd)
		if err != nil {
			err = fmt.Errorf("enter network namespace net:[%d]: %w", n.Inode, err)
		}
	}
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	err = f()
	if unix.Setns(home, unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
	return err
}
